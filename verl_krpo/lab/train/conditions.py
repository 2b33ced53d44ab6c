"""What a run is. A condition takes 64 rollouts a step, 32 where prompts recur, 128 in calm, harsh and the table of
compare.py.

On policy a batch makes one Adam step of an unclipped gradient, so that Adam makes nothing of an advantage's overall
scale, and methods are compared by what they say of one response against another. Off policy (calm, harsh, length_256
and so on) it is cut into mini-batches, one Adam step each, and as in verl the gradient's norm is clipped at 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verl_krpo.lab.train.tasks import GYM


@dataclass(frozen=True)
class Condition:
    """prompts x size rollouts a step of a task of tasks.py, cut into `updates` mini-batches.

    pool: how many prompts recur (0: always new ones); kl: weight of k3; clip: of the gradient's norm; stale: a batch is
    sampled by the model of so many steps before.
    """

    name: str
    prompts: int
    size: int
    task: str = "sharpen"
    noise: str = "none"
    level: float = 0.0
    pool: int = 0
    kl: float = 0.0
    learning_rate: float = 1e-4
    steps: int = 60
    every: int = 5  # steps from one look at the accuracy to the next
    updates: int = 1
    stale: int = 0
    clip: float = float("inf")
    loss_agg_mode: str = "token-mean"


def _off_policy(
    name: str, task: str, learning_rate: float, steps: int, prompts: int = 16, every: int = 1, stale: int = 0
) -> Condition:
    return Condition(
        name, prompts, 8, task, learning_rate=learning_rate, steps=steps, every=every, updates=16, stale=stale,
        clip=1.0, loss_agg_mode="seq-mean-token-mean",
    )  # fmt: skip


def _flip(level: float, shape: tuple[int, int], generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """A reward r becomes 1 - r with probability `level`."""
    flipped = torch.rand(shape, generator=generator) < level
    return lambda rewards: torch.where(flipped, 1 - rewards, rewards)


def _gaussian(level: float, shape: tuple[int, int], generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """r + N(0, level^2)."""
    noise = level * torch.randn(shape, generator=generator, dtype=torch.float64)
    return lambda rewards: rewards + noise


def _judge(level: float, shape: tuple[int, int], generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """A judge's grade in (0, 1): the logistic function of 4 r - 2 + N(0, level^2)."""
    noise = level * torch.randn(shape, generator=generator, dtype=torch.float64)
    return lambda rewards: torch.sigmoid(4 * rewards - 2 + noise)


NOISES = {
    "none": lambda level, shape, generator: lambda rewards: rewards,
    "signed": lambda level, shape, generator: lambda rewards: 2 * rewards - 1,
    "flip": _flip,
    "gaussian": _gaussian,
    "judge": _judge,
}

CONDITIONS = {
    condition.name: condition
    for condition in (
        Condition("pairs", 32, 2),
        Condition("fours", 16, 4),
        Condition("fours_flip", 16, 4, noise="flip", level=0.2),
        Condition("eights", 8, 8),
        Condition("sixteens", 4, 16),
        Condition("fours_gaussian", 16, 4, noise="gaussian", level=0.5),
        Condition("fours_judge", 16, 4, noise="judge", level=1.5),
        Condition("fours_kl_0.01", 16, 4, kl=0.01),
        Condition("fours_kl_0.05", 16, 4, kl=0.05),
        Condition("fours_signed", 16, 4, noise="signed"),
        Condition("learn_pairs", 32, 2, "learn", steps=200),
        Condition("learn_eights", 8, 8, "learn", steps=200),
        Condition("recurring", 16, 2, pool=64, steps=80),
        Condition("recurring_flip", 16, 2, pool=64, steps=80, noise="flip", level=0.2),
        Condition("recurring_single", 32, 1, pool=64, steps=80),
        # The learning rate for every method apart, on other seeds (--first-seed 100).
        *(Condition(f"pairs_lr_{rate:g}", 32, 2, learning_rate=rate) for rate in (5e-5, 1e-4, 2e-4, 4e-4)),
        _off_policy("calm", "digits_32", 3e-4, 15),
        _off_policy("harsh", "digits_32", 1e-3, 20),
        _off_policy("calm_long", "digits_128", 3e-4, 15),
        _off_policy("harsh_long", "digits_128", 1e-3, 20),
        *(
            _off_policy(f"length_{length}{age}{speed}", f"digits_{length}", rate, 15, prompts=8, every=3, stale=stale)
            for length in (256, 512, 1024)
            for age, stale in (("", 0), ("_stale", 2))
            for speed, rate in (("", 3e-4), ("_harsh", 1e-3))
        ),
    )
}


def _compared(name: str, task: str, **fields: object) -> Condition:
    return Condition(name, 32, 4, task, steps=100, **fields)


# Of compare.py's table.
COMPARED = {
    condition.name: condition
    for condition in (
        _compared("sharpen", "sharpen"),
        _compared("learn", "learn"),
        _compared("learn_flip", "learn", noise="flip", level=0.2),
        _compared("learn_signed", "learn", noise="signed"),
        _compared("mixed", "mixed"),
        _compared("mixed_recurring", "mixed", pool=256),
        *(_compared(task, task) for task in GYM),
    )
}
RATES = (5e-5, 1e-4, 2e-4)


def at_rate(condition: str, rate: float) -> str:
    """The name of one of COMPARED at a learning rate, as learn_lr_0.0002."""
    return f"{condition}_lr_{rate:g}"


CONDITIONS |= COMPARED | {
    at_rate(name, rate): replace(condition, name=at_rate(name, rate), learning_rate=rate)
    for name, condition in COMPARED.items()
    for rate in RATES
}
