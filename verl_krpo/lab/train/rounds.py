"""Answers of any length from a model that is cheap at every length: only the length matters.

Eight digits are shown, and every further digit is the one eight places before, plus one, modulo ten:
27182818 38293929 49304030 ... until the answer is cut off, for nothing ends it.

The model has one layer that sees the last WINDOW tokens, so that a token costs the same wherever it stands, and a
vocabulary of the ten digits.
"""

import random

import torch

SHOWN = 8
WINDOW = 16
DEMONSTRATED = 128  # digits of a demonstration: the model cannot tell how far it has come
PAD, END = "p", "e"


def draw(length: int, rng: random.Random, count: int, held_out: bool = False) -> list[tuple[str, str]]:
    """(shown, the right answer of `length` digits); there are 10^8, so that hardly one comes again."""
    return [_continued(rng, length, 0.0) for _ in range(count)]


def careless(drawn_anew: float, rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Demonstrations: `drawn_anew` of the digits are; the next rounds go on from what was written."""
    return [_continued(rng, DEMONSTRATED, drawn_anew) for _ in range(count)]


def _continued(rng: random.Random, length: int, drawn_anew: float) -> tuple[str, str]:
    digits = [rng.randrange(10) for _ in range(SHOWN)]
    for _ in range(length):
        digits.append(rng.randrange(10) if rng.random() < drawn_anew else (digits[-SHOWN] + 1) % 10)
    text = "".join(map(str, digits))
    return text[:SHOWN], text[SHOWN:]


def blank(seed: int):
    """A tokenizer and a Qwen2ForCausalLM with hidden size 32 and one layer, in float32, with random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    vocab = {token: index for index, token in enumerate([*"0123456789", PAD, END])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], unk_token=PAD, pad_token=PAD, eos_token=END)
    config = Qwen2Config(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=0,
        # As in tiny_model.py: for quick learning.
        initializer_range=32**-0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        pad_token_id=vocab[PAD],
        eos_token_id=vocab[END],
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return tokenizer, Qwen2ForCausalLM(config)
