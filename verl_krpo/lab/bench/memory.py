"""What a memory of many prompts costs: its size, a step of 256 known prompts x 8 responses, and a checkpoint's part.

And to choose these prompts from 1,024, with a number of responses each.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from verl_krpo import choice
from verl_krpo.advantage.memory import PromptMemory, krpo_memory

PROMPTS = (10_000, 100_000, 1_000_000)
STEP, SIZE, CANDIDATES = 256, 8, 1024


def table(rounds: int, device: str = "cpu") -> list[dict]:
    """One row a number of remembered prompts."""
    return [_row(prompts, rounds) for prompts in PROMPTS]


def _row(prompts: int, rounds: int) -> dict:
    rng = np.random.default_rng(0)
    names = np.array([f"openai/gsm8k:{prompt:032x}" for prompt in range(prompts)], object)
    unseen = torch.zeros(prompts, dtype=torch.float64)
    memory = PromptMemory().store(names, 0, unseen, unseen + 0.05)
    seconds, choosing = [], []
    for step in range(1, rounds + 2):
        candidates = rng.choice(names, min(CANDIDATES, prompts), replace=False)
        start = time.perf_counter()
        forecast = memory.forecast(candidates, step)
        signals = choice.expected(*forecast)
        chosen = choice.choose(choice.draw(*forecast, rng), STEP, rng)
        choice.allocate(signals[chosen], STEP * SIZE)
        choosing.append(time.perf_counter() - start)
        keys = np.repeat(candidates[chosen], SIZE)
        rewards = torch.from_numpy(rng.integers(0, 2, STEP * SIZE).astype(float))
        start = time.perf_counter()
        _, memory = krpo_memory(rewards, keys, memory, step=step)
        seconds.append(time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.npz"
        start = time.perf_counter()
        memory.save(path)
        saved = time.perf_counter()
        PromptMemory.load(path)
        loaded = time.perf_counter()
    return {
        "prompts": f"{prompts:,}",
        "MB": sum(value.nbytes for value in vars(memory).values() if isinstance(value, np.ndarray)) / 1e6,
        "ms a step": 1e3 * statistics.median(seconds[1:]),  # the first step has no noises yet
        "ms to choose": 1e3 * statistics.median(choosing[1:]),
        "ms to save": 1e3 * (saved - start),
        "ms to load": 1e3 * (loaded - saved),
    }
