"""What every estimator takes and gives: rewards by group, and advantages."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from verl_krpo.advantage.groups import Groups, group
from verl_krpo.config import Order
from verl_krpo.kalman import LocalLevel


class Observed(NamedTuple):
    """The rewards of a batch by group; (groups, width) float64, 0 beyond a group's size.

    Attributes:
        weights: w of the noise R / w that every reward has, in units of their mean; 1 where none are given
        unit: that mean
    """

    groups: Groups
    rewards: torch.Tensor
    weights: torch.Tensor
    unit: float = 1.0


class Estimate(NamedTuple):
    """(groups, width) float64 matrices, members in the estimator's order; entries beyond a group's size mean nothing.

    Attributes:
        groups: which row is where
        rewards, weights: as observed
        model: Q, R, m0 and P0 that were used, numbers or (groups,); None for a baseline without a model
        scale_var: R as it enters the scale; NaN without a model
        baseline, baseline_var: b and its variance V under the model; V is NaN without one
        advantage: A = (r - b) / scale
    """

    groups: Groups
    rewards: torch.Tensor
    weights: torch.Tensor
    model: LocalLevel | None
    scale_var: float
    baseline: torch.Tensor
    baseline_var: torch.Tensor
    advantage: torch.Tensor

    def advantages(self) -> torch.Tensor:
        """A by row, (rows,) float64; 0 in rows that are not counted."""
        return self.groups.scatter(self.advantage)


def observe(
    rewards: torch.Tensor | Sequence[float],
    prompts: object,
    weights: torch.Tensor | None = None,
    counted: torch.Tensor | None = None,
    order: Order = Order.arrival,
) -> Observed:
    """Rewards (rows,) whose prompt ids are `prompts` (rows,), in any order, by group.

    weights: (rows,) >= 0. Only their ratios matter, and where all are 0 they are as good as equal: no response has a
    score, hence no baseline a variance. counted: (rows,) bool, rows that are members of their group; None: all.
    ValueError names the rows and prompts of rewards or weights that are not finite, and rows without a prompt id.
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    counted = torch.ones_like(rewards, dtype=torch.bool) if counted is None else counted
    groups = group(prompts, counted, order)
    _require(
        "rewards",
        rewards,
        rewards.isfinite(),
        groups,
        "are not finite",
        "make the reward function return finite numbers",
    )
    values = groups.gather(rewards)
    if weights is None:
        return Observed(groups, values, groups.mask.double())
    weights = torch.as_tensor(weights, dtype=torch.float64)
    if weights.shape != rewards.shape:
        raise ValueError(f"weights have shape {tuple(weights.shape)}, rewards {tuple(rewards.shape)}: one a row")
    valid = weights.isfinite() & (weights >= 0)
    _require(
        "weights", weights, valid, groups, "are not finite and >= 0", "look at the log-probs that they are made of"
    )
    members = groups.gather(weights)
    unit = members.sum().item() / max(1, len(groups.rows))
    return Observed(groups, values, members / unit, unit) if unit else Observed(groups, values, groups.mask.double())


def _require(name: str, values: torch.Tensor, valid: torch.Tensor, groups: Groups, what: str, way_out: str) -> None:
    """ValueError where a counted value is not valid."""
    wrong = (~valid[groups.rows]).nonzero().flatten()[:8]
    if len(wrong):
        rows = groups.rows[wrong]
        raise ValueError(
            f"krpo got {name} that {what}: {values[rows].tolist()} in rows {rows.tolist()} of prompts "
            f"{groups.label_of(wrong)}; {way_out}"
        )
