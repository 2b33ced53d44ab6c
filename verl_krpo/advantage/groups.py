"""Rows and groups: which rows answer the same prompt, in which order they are filtered, and statistics of groups.

A batch is flat: row k holds one response, its prompt id is `prompts[k]`, and the rows of a prompt may lie anywhere. The
filter wants (groups, members). `Groups` goes from one to the other and back; beside the
memory, which knows prompts from step to step, nothing else reads prompt ids.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch

from verl_krpo.config import Order


@dataclass(frozen=True)
class Groups:
    """The counted rows of a batch, sorted by group and, within a group, by place.

    Attributes:
        labels: (groups,) prompt ids, in order of first appearance
        rows: (counted,) row of each member
        mask: (groups, width) bool, where the matrix of the groups holds a member: the first `sizes` places of its line
        total: rows of the batch, counted or not
    """

    labels: np.ndarray
    rows: torch.Tensor
    mask: torch.Tensor
    total: int

    @property
    def sizes(self) -> torch.Tensor:
        """(groups,) members of each group, >= 1."""
        return self.mask.sum(dim=1)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Values of rows (rows,) to (groups, width), zero where there is no member."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values[self.rows])

    def scatter(self, matrix: torch.Tensor) -> torch.Tensor:
        """(groups, width) back to (rows,), zero in the rows that are not counted."""
        values = matrix.new_zeros(self.total)
        values[self.rows] = matrix[self.mask]
        return values

    def label_of(self, members: torch.Tensor) -> list:
        """Prompt ids of some counted members, given by their position in `rows`."""
        return self.labels[self.mask.nonzero()[members, 0].cpu().numpy()].tolist()


def group(prompts: object, counted: torch.Tensor, order: Order = Order.arrival) -> Groups:
    """Group the rows where `counted` (rows,) is true by their prompt id `prompts` (rows,).

    `arrival` keeps the order of the batch within a group. `shuffled` puts member j of prompt u at the rank of a hash of
    (u, j) among its group: the same ids give the same permutation in every process, whatever else is in the batch, and
    a member's place follows neither its length nor its reward nor its arrival. (verl's rows arrive shortest first and
    are then balanced by length across ranks.)

    ValueError when the ids are missing, have another length, or leave a row without one.
    """
    if prompts is None:
        raise ValueError("krpo groups responses by prompt and got index=None: the batch needs `uid` for every row")
    labels = np.asarray(prompts.cpu() if isinstance(prompts, torch.Tensor) else prompts)
    if labels.shape != (len(counted),):
        raise ValueError(f"index has shape {labels.shape} for {len(counted)} rows: krpo needs one prompt id a row")

    rows = np.flatnonzero(counted.cpu().numpy())
    ids = labels[rows].tolist()
    number: dict = {}
    codes = np.array([number.setdefault(name, len(number)) for name in ids], dtype=np.int64)
    if any(name is None or name != name for name in number):
        missing = [row for row, name in zip(rows.tolist(), ids, strict=True) if name is None or name != name]
        raise ValueError(f"no prompt id (None or NaN) in index at rows {missing[:8]}")
    labels = np.fromiter(number, dtype=labels.dtype, count=len(number))
    rows = rows[np.argsort(codes, kind="stable")]
    sizes = np.bincount(codes, minlength=len(labels))
    mask = np.arange(sizes.max(initial=1)) < sizes[:, None]

    if order == Order.shuffled:
        keys = _mix(hashed(labels)[:, None], np.arange(mask.shape[1])) >> np.uint64(1)
        keys[~mask] = np.iinfo(np.uint64).max  # absent members sort last: halved, every key is below this one
        matrix = np.zeros(mask.shape, dtype=rows.dtype)
        matrix[mask] = rows
        rows = np.take_along_axis(matrix, np.argsort(keys, axis=1), axis=1)[mask]

    device = counted.device
    return Groups(labels, torch.from_numpy(rows).to(device), torch.from_numpy(mask).to(device), len(counted))


def moments(values: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of values (groups, width) the weighted means and the weighted sums of squares around them, (groups,).

    weights: (groups, width), 0 where there is no member. A group without weight has mean and squares 0.
    """
    # From the first member with a weight on: equal values have squares of exactly 0, not of rounding errors.
    first, total = values.gather(1, (weights > 0).int().argmax(dim=1, keepdim=True)), weights.sum(dim=1)
    deviations = values - first
    means = (weights * deviations).sum(dim=1) / torch.where(total > 0, total, 1.0)
    squares = (weights * (deviations - means[:, None]).square()).sum(dim=1)
    return torch.where(total > 0, first[:, 0] + means, 0.0), squares


def sum_of_others(values: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """For every entry along `dim` the sum of the others, without subtracting: nothing cancels, zeros stay zero."""
    none = torch.zeros_like(values.narrow(dim, 0, min(1, values.shape[dim])))
    before = torch.cat([none, values.cumsum(dim)], dim).narrow(dim, 0, values.shape[dim])
    after = torch.cat([none, values.flip(dim).cumsum(dim)], dim).narrow(dim, 0, values.shape[dim]).flip(dim)
    return before + after


class Variation(NamedTuple):
    """One-way analysis of variance of groups whose members have the noise R / w and whose means vary by P0.

    With weights w, W_g the sum of a group's, W of all, n_g its members with w > 0, and weighted means:

        E within  = within_degrees R                     sum w (r - mean_g)^2,        sum (n_g - 1)
        E between = between_degrees R + spread P0        sum W_g (mean_g - mean)^2,   groups - 1,   W - sum W_g^2 / W
    """

    within: torch.Tensor
    within_degrees: torch.Tensor
    between: torch.Tensor
    between_degrees: torch.Tensor
    spread: torch.Tensor


def variation(values: torch.Tensor, weights: torch.Tensor, over: Callable[[torch.Tensor], torch.Tensor]) -> Variation:
    """Sums `over` all groups (torch.sum) or, for every group, over the others (sum_of_others).

    values, weights: (groups, width); squares do not cancel where values are small beside their spread.
    """
    means, squares = moments(values, weights)
    members, weight = (weights > 0).sum(dim=1).double(), weights.sum(dim=1)
    total = over(weight)
    shift = over(weight * means) / torch.where(total > 0, total, 1.0)  # their mean
    return Variation(
        over(squares),
        over((members - 1).clamp(min=0)),
        over(weight * means.square()) - total * shift.square(),
        over((members > 0).double()) - 1,
        total - over(weight.square()) / torch.where(total > 0, total, 1.0),
    )


def hashed(prompts: Iterable) -> np.ndarray:
    """64 bits a prompt id, by its text: the same in every process and run (Python's own hash of a string is not)."""
    return np.array(
        [int.from_bytes(blake2b(str(prompt).encode(), digest_size=8).digest(), "big") for prompt in prompts], np.uint64
    )


def _mix(seeds: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Output `numbers` of the SplitMix64 generators with these seeds (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = seeds + (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
