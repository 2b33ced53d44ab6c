"""A pretrained model in the laboratory: a transformers folder and problems as verl's parquet has them.

    python scripts/pretrained_cpu.py OUT      OUT/model, OUT/data: SmolLM2-135M and sums of two digits, no hub needed

Of the problems those count whose prompts have the length that most have, as batches are not padded.
"""

import collections
import functools
import random
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from verl_krpo.lab.train import loop
from verl_krpo.lab.train.methods import Batch
from verl_krpo.reward.math import compute_score

MAX_TOKENS = 16


class Pretrained(NamedTuple):
    """prompts: (problems, tokens); answers: the right ones."""

    model: torch.nn.Module
    tokenizer: object
    prompts: Tensor
    answers: list[str]

    def batch(self, prompts: int, size: int, number: int) -> Batch:
        """The same number gives the same batch."""
        chosen = random.Random(number).sample(range(len(self.answers)), prompts)
        end, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        generator = torch.Generator().manual_seed(number)
        sampled = loop.sample(self.model, self.prompts[chosen], size, end, pad, generator, MAX_TOKENS)
        texts = self.tokenizer.batch_decode(sampled.tokens, skip_special_tokens=True)
        answers = [self.answers[k] for k in chosen for _ in range(size)]
        rewards = [compute_score("", text, answer)["score"] for text, answer in zip(texts, answers, strict=True)]
        rewards = torch.tensor(rewards, dtype=torch.float64).view(prompts, size)
        return Batch(rewards, [str(k) for k in chosen], number, self.prompts[chosen], self.model, *sampled)


@functools.cache
def load(folder: Path) -> Pretrained:
    """FOLDER/model and FOLDER/data/train.parquet."""
    import pandas as pd
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    rows = pd.read_parquet(folder / "data" / "train.parquet")
    prompts = [
        tokenizer.apply_chat_template([dict(turn) for turn in turns], add_generation_prompt=True)["input_ids"]
        for turns in rows["prompt"]
    ]
    answers = [reward["ground_truth"] for reward in rows["reward_model"]]
    ((length, _),) = collections.Counter(map(len, prompts)).most_common(1)
    kept = [k for k, prompt in enumerate(prompts) if len(prompt) == length]
    return Pretrained(model, tokenizer, torch.tensor([prompts[k] for k in kept]), [answers[k] for k in kept])
