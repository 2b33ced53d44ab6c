"""What the KRPO estimator costs: `python -m verl_krpo.bench_krpo [--rounds 15]` prints a Markdown table.

Every form against verl's `grpo`, a loop over rows, and `grpo_vectorized`, on shuffled rows with uuid labels, each row
with a string object of its own as they come out of verl's queue. The calls of a round follow one another and ratios are
taken within rounds, so that a busy machine slows both sides alike. One thread on a CPU. Responses have 8 tokens: the
product with the mask is the same for all and grows with them.
"""

import argparse
import dataclasses
import statistics
import uuid
from collections.abc import Callable

import numpy as np
import torch

from verl_krpo.bench import median_ratio, peak_bytes
from verl_krpo.bench_kpo import paired_times
from verl_krpo.config import Baseline, KrpoConfig, Scale

SHAPES = ((1024, 8), (1024, 64), (4096, 16), (4096, 64))
TOKENS = 8


def batch(prompts: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """token_level_rewards, response_mask (rows, tokens) and index (rows,): full groups, rows in random order."""
    rng = np.random.default_rng(seed)
    uids = [str(uuid.UUID(bytes=rng.bytes(16))) for _ in range(prompts)]
    index = np.array(["".join(list(uids[k])) for k in rng.permutation(np.repeat(np.arange(prompts), size))], object)
    rewards = torch.zeros(prompts * size, TOKENS)
    rewards[:, -1] = torch.from_numpy(rng.integers(0, 2, prompts * size)).float()
    return rewards, torch.ones(prompts * size, TOKENS, dtype=torch.int64), index


def forms() -> dict[str, KrpoConfig]:
    """Every baseline, every scale, and the adaptive preset."""
    from verl_krpo.advantage.krpo import ADAPTIVE

    return (
        {f"krpo {baseline.value}": KrpoConfig(baseline=baseline) for baseline in Baseline}
        | {f"krpo {scale.value}": KrpoConfig(scale=scale) for scale in Scale if scale != KrpoConfig.scale}
        | {"krpo_adaptive": ADAPTIVE, "krpo_adaptive, Q = 1e-5": dataclasses.replace(ADAPTIVE, process_var=1e-5)}
    )


def estimators(rewards: torch.Tensor, mask: torch.Tensor, index: np.ndarray) -> dict[str, Callable[[], object]]:
    """What is compared, by name."""
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    from verl_krpo.advantage import krpo

    def ours(settings):
        config = {"krpo": {**vars(settings)}}
        return lambda: krpo.compute_advantage(rewards, mask, config, index)

    def verls(name):
        return lambda: get_adv_estimator_fn(name)(rewards, mask, index=index)

    return {name: verls(name) for name in ("grpo", "grpo_vectorized")} | {
        name: ours(settings) for name, settings in forms().items()
    }


def table(rounds: int) -> str:
    """Median times, ratios of verl's estimators to ours, peak memory by the tensor of rewards (rows, tokens)."""
    lines = [
        "| prompts x group | estimator | ms | grpo takes | grpo_vectorized takes | peak memory / token_level_rewards |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for prompts, size in SHAPES:
        rewards, mask, index = batch(prompts, size)
        calls = estimators(rewards, mask, index)
        # The loop takes seconds where the others take milliseconds: fewer rounds there.
        times = paired_times(calls, rounds if prompts * size < 50_000 else max(3, rounds // 3), "cpu")
        for name, call in calls.items():
            loop, vectorized = (median_ratio(times[other], times[name]) for other in ("grpo", "grpo_vectorized"))
            memory = peak_bytes(call, "cpu") / (rewards.numel() * rewards.element_size())
            lines.append(
                f"| {prompts} x {size} | {name} | {statistics.median(times[name]) * 1e3:.2f} | "
                f"{loop:.1f} x | {vectorized:.2f} x | {memory:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(table(arguments.rounds))


if __name__ == "__main__":
    main()
