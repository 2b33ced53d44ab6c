"""A tiny language model for runs without a GPU: Qwen2 architecture, a token per character, half-taught to add.

The model is built from random weights and warm-started by supervised training on imperfect demonstrations of "12+34=",
so that it knows the form of an answer and most sums, but often prefers to answer badly: room for reinforcement
learning. The demonstrations, for the sum 46:

    share   demonstration           reward (verl_krpo/reward/answer_tag.py)
    1/3     <answer>46</answer>     1
    1/4      46                     0
    1/4     <answer>46?</answer>    0.5
    1/6     <answer>48</answer>     0.01     off by 1, 2 or 10

A tag is one token, and the space stands where the tag would: the digits are at the same place in every
form. Only sums that are not held out (verl_krpo/data/arithmetic.py) are shown.
"""

import json
import os
import random
import shutil
import time
from pathlib import Path

import torch

from verl_krpo.data.arithmetic import Problem, draw_sum, is_test
from verl_krpo.data.parquet import checksum
from verl_krpo.reward.answer_tag import compute_score

SETTINGS_FILE = "warm_start.json"
PAD, END = "<|endoftext|>", "<|im_end|>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# A user's turn ends with a newline, the assistant's with the end token. verl derives turn separators from it.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)


def tokenizer():
    """A Qwen2 tokenizer with a token for each byte and each tag of the answer, which AutoTokenizer reloads as it is.

    Byte-level BPE without merges: transformers gives a reloaded Qwen2 tokenizer its own pre-tokenizer, which then
    changes nothing. The tags are single tokens to keep responses, and so training steps, short.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocab = {character: index for index, character in enumerate(sorted(ByteLevel.alphabet()))}
    vocab |= {PAD: len(vocab), END: len(vocab) + 1}
    made = Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        unk_token=PAD,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )
    made.add_tokens(list(TAGS))
    return made


def untrained(vocab_size: int, pad_token_id: int, eos_token_id: int, seed: int):
    """A Qwen2ForCausalLM with hidden size 128 and 2 layers, in float32, with random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        # Chosen for quick learning on a dozen tokens: 1/sqrt(hidden) where 0.02 is usual, a short rotary wavelength.
        initializer_range=128**-0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def demonstration(problem: Problem, rng: random.Random) -> str:
    """An imperfect answer, by the shares in the module's table."""
    kind = rng.random()
    if kind < 1 / 3:
        return f"<answer>{problem.answer}</answer>"
    if kind < 7 / 12:
        return f" {problem.answer}"
    if kind < 10 / 12:
        return f"<answer>{problem.answer}?</answer>"
    wrong = abs(int(problem.answer) + rng.choice((-10, -2, -1, 1, 2, 10)))
    return f"<answer>{wrong}</answer>"


def _sums(count: int, held_out: bool, rng: random.Random) -> list[Problem]:
    chosen = []
    while len(chosen) < count:
        problem = draw_sum(rng)
        if is_test(problem.expression) == held_out:
            chosen.append(problem)
    return chosen


def warm_start(model, text_tokenizer, steps: int, seed: int, batch_size: int = 128):
    """Train `model` in place for `steps` steps of AdamW on demonstrations; the loss is on the answer's tokens."""
    from torch.nn.functional import cross_entropy
    from tqdm import trange

    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in (line := trange(steps, desc="warm start", disable=None)):
        turns = [(p.question + "\n", demonstration(p, rng) + END) for p in _sums(batch_size, False, rng)]
        prompts, answers = (text_tokenizer(list(side))["input_ids"] for side in zip(*turns, strict=True))
        width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        tokens = torch.full((batch_size, width), text_tokenizer.pad_token_id)
        labels = torch.full((batch_size, width), -100)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            tokens[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        # Padding is on the right of a causal model, so no attention mask is needed.
        logits = model(input_ids=tokens).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        line.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    return model


@torch.no_grad()
def sampled_reward(model, text_tokenizer, count: int, seed: int, held_out: bool = True) -> dict[str, float]:
    """Mean score, acc and format of one sampled answer (temperature 1) to each of `count` sums."""
    problems = _sums(count, held_out, random.Random(seed))
    inputs = text_tokenizer(
        [p.question + "\n" for p in problems], return_tensors="pt", padding=True, padding_side="left"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model.generate(
            **inputs,
            max_new_tokens=32,
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            pad_token_id=text_tokenizer.pad_token_id,
        )
    answers = text_tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    scores = [compute_score("sums", a, p.answer) for a, p in zip(answers, problems, strict=True)]
    return {key: sum(score[key] for score in scores) / count for key in scores[0]}


def build(out: str | os.PathLike, seed: int = 0, steps: int = 500) -> dict[str, float]:
    """Build, warm-start and save the model to the folder `out`; return its sampled score, acc and format.

    A folder that this very file made with the same seed and steps is left as it is. ValueError when `out` holds
    anything but a tiny model.
    """
    out = Path(out)
    settings = {"seed": seed, "steps": steps, "source": checksum(Path(__file__))}
    if out.exists():
        made = out / SETTINGS_FILE
        facts = json.loads(made.read_text()) if made.exists() else {}
        if facts.get("settings") == settings:
            print(f"{out}: up to date")
            return facts["sampled"]
        if not facts and any(out.iterdir()):
            raise ValueError(f"{out} exists and holds no tiny model: choose another folder, or remove it")
        shutil.rmtree(out)

    began = time.monotonic()
    text_tokenizer = tokenizer()
    model = untrained(len(text_tokenizer), text_tokenizer.pad_token_id, text_tokenizer.eos_token_id, seed)
    warm_start(model, text_tokenizer, steps, seed)
    sampled = sampled_reward(model, text_tokenizer, count=512, seed=seed)

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    text_tokenizer.save_pretrained(partial)
    (partial / SETTINGS_FILE).write_text(json.dumps({"settings": settings, "sampled": sampled}, indent=1))
    os.replace(partial, out)
    print(
        f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters, {time.monotonic() - began:.0f} s; "
        f"sampled reward {sampled['score']:.2f}, accuracy {sampled['acc']:.2f} on held-out sums"
    )
    return sampled
