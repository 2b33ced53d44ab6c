"""What the KRPO estimator costs: every form against verl's `grpo`, a loop over rows, and `grpo_vectorized`.

On shuffled rows with uuid labels, each row with a string object of its own as they come out of verl's queue. Responses
have 8 tokens: the product with the mask is the same for all and grows with them.
"""

import statistics
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from verl_krpo.advantage import ESTIMATORS
from verl_krpo.advantage.weights import score_weights
from verl_krpo.config import Baseline, KrpoConfig, Scale
from verl_krpo.lab.bench.timing import median_ratio, paired, peak_bytes

SHAPES = ((1024, 8), (1024, 64), (4096, 16), (4096, 64))
TOKENS = 8
WEIGHTED = "krpo_adaptive, weight=score"  # without the metrics, which a trainer's step takes besides


def batch(prompts: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """token_level_rewards, response_mask (rows, tokens) and index (rows,): full groups, rows in random order."""
    rng = np.random.default_rng(seed)
    uids = [str(uuid.UUID(bytes=rng.bytes(16))) for _ in range(prompts)]
    index = np.array(["".join(list(uids[k])) for k in rng.permutation(np.repeat(np.arange(prompts), size))], object)
    rewards = torch.zeros(prompts * size, TOKENS)
    rewards[:, -1] = torch.from_numpy(rng.integers(0, 2, prompts * size)).float()
    return rewards, torch.ones(prompts * size, TOKENS, dtype=torch.int64), index


def forms() -> dict[str, tuple[str, Any]]:
    """Name -> estimator and settings: every baseline and scale of krpo, and the others but the memory (memory.py)."""
    return (
        {f"krpo {baseline.value}": ("krpo", KrpoConfig(baseline=baseline)) for baseline in Baseline}
        | {f"krpo {scale.value}": ("krpo", KrpoConfig(scale=scale)) for scale in Scale if scale != KrpoConfig.scale}
        | {name: (name, ESTIMATORS[name].keys()) for name in ("jspo", "krpo_adaptive")}
    )


def estimators(rewards: torch.Tensor, mask: torch.Tensor, index: np.ndarray) -> dict[str, Callable[[], object]]:
    """What is compared, by name."""
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    from verl_krpo.plugin import metrics
    from verl_krpo.plugin.estimator import compute_advantage

    def ours(name, settings):
        config = {name: {**vars(settings)}}

        def call():
            compute_advantage(name, rewards, mask, config, index)
            metrics.discard()  # a trainer's log takes them, once a step

        return call

    def verls(name):
        return lambda: get_adv_estimator_fn(name)(rewards, mask, index=index)

    def weighted():
        weights = score_weights(log_probs, mask)
        estimate = ESTIMATORS["krpo_adaptive"].estimate(rewards.sum(dim=1), index, None, weights)
        return torch.where(mask.bool(), estimate.advantages().float()[:, None], 0.0)

    log_probs = -torch.rand(rewards.shape, generator=torch.Generator().manual_seed(0))
    return (
        {name: verls(name) for name in ("grpo", "grpo_vectorized")}
        | {form: ours(*estimator) for form, estimator in forms().items()}
        | {WEIGHTED: weighted}
    )


def table(rounds: int, device: str = "cpu") -> list[dict]:
    """One row a shape and estimator: how many times as long verl's take, and peak memory beyond the arguments."""
    return [row for shape in SHAPES for row in _rows(*shape, rounds)]


def _rows(prompts: int, size: int, rounds: int) -> list[dict]:
    rewards, mask, index = batch(prompts, size)
    calls = estimators(rewards, mask, index)
    # The loop takes seconds where the others take milliseconds: fewer rounds there.
    times = paired(calls, rounds if prompts * size < 50_000 else max(3, rounds // 3))
    return [
        {
            "prompts x group": f"{prompts} x {size}",
            "estimator": name,
            "ms": statistics.median(times[name]) * 1e3,
            "grpo takes": median_ratio(times["grpo"], times[name]),
            "grpo_vectorized takes": median_ratio(times["grpo_vectorized"], times[name]),
            "peak extra memory / token_level_rewards": peak_bytes(call) / rewards.nbytes,
        }
        for name, call in calls.items()
    ]
