"""Rows and groups: which rows of a batch answer the same prompt, and in which order they are filtered.

A batch is flat: row k holds one response, its prompt id is `index[k]`, and the rows of a prompt may lie anywhere. The
filter wants (groups, members). `Groups` goes from one to the other and back; nothing else in the package reads uids.
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch

from verl_krpo.config import Order


@dataclass(frozen=True)
class Groups:
    """The counted rows of a batch, sorted by group and, within a group, by place.

    Attributes:
        labels: (groups,) prompt ids, in order of first appearance
        sizes: (groups,) members of each group, >= 1
        rows: (counted,) row of each member
        slots: (counted,) its position group * width + place in a flattened (groups, width) matrix
        mask: (groups, width) bool, where the matrix holds a member; None where every group is full
    """

    labels: np.ndarray
    sizes: torch.Tensor
    rows: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor | None
    width: int

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Values of rows (rows,) to (groups, width), zero where there is no member."""
        if self.mask is None:
            return values[self.rows].view(len(self.labels), self.width)
        matrix = values.new_zeros(len(self.labels) * self.width)
        matrix[self.slots] = values[self.rows]
        return matrix.view(len(self.labels), self.width)

    def scatter(self, matrix: torch.Tensor, rows: int) -> torch.Tensor:
        """(groups, width) back to (rows,), zero in the rows that are not counted."""
        values = matrix.new_zeros(rows)
        values[self.rows] = matrix.reshape(-1) if self.mask is None else matrix.reshape(-1)[self.slots]
        return values

    def label_of(self, members: torch.Tensor) -> list:
        """Prompt ids of some counted members, given by their position in `rows`."""
        return list(self.labels[(self.slots[members] // self.width).cpu().numpy()])


def group(index: object, counted: torch.Tensor, order: Order = Order.arrival) -> Groups:
    """Group the rows where `counted` (rows,) is true by their prompt id `index` (rows,).

    `arrival` keeps the order of the batch within a group. `shuffled` puts member j of prompt u at the rank of a hash of
    (u, j) among its group: the same uids give the same permutation in every process, whatever else is in the batch, and
    a member's place follows neither its length nor its reward nor its arrival. (verl's rows arrive shortest first and
    are then balanced by length across ranks.)

    ValueError when `index` is missing, has another length, or holds a row without an id.
    """
    import pandas as pd  # here, since every worker loads the plugin and only the trainer groups

    if index is None:
        raise ValueError("krpo groups responses by prompt and got index=None: the batch needs `uid` for every row")
    labels = np.asarray(index.cpu() if isinstance(index, torch.Tensor) else index)
    if labels.shape != (len(counted),):
        raise ValueError(f"index has shape {labels.shape} for {len(counted)} rows: krpo needs one prompt id a row")

    device = counted.device
    rows = np.flatnonzero(counted.cpu().numpy())
    numbered = defaultdict(count().__next__)  # prompt id -> number, in order of first appearance
    ids = labels if len(rows) == len(labels) else labels[rows]
    codes = np.fromiter(map(numbered.__getitem__, ids.tolist()), np.int64, len(rows))
    uniques = np.fromiter(numbered, object, len(numbered))
    missing = pd.isna(uniques)
    if missing.any():
        raise ValueError(f"no prompt id (None or NaN) in index at rows {rows[missing[codes]][:8].tolist()}")

    # A stable sort of 16 bits is numpy's radix sort, many times faster than one of 64.
    members = np.argsort(codes.astype(np.min_scalar_type(len(uniques))), kind="stable")
    codes, rows = codes[members], rows[members]
    sizes = np.bincount(codes, minlength=len(uniques))
    width = int(sizes.max(initial=1))
    starts = np.cumsum(sizes) - sizes
    places = np.arange(len(rows)) - starts[codes]
    slots = codes * width + places
    full = len(rows) == len(uniques) * width

    if order == Order.shuffled:
        keys = _mix(_hash(uniques)[:, None], np.arange(width)) >> np.uint64(1)
        if not full:  # absent members sort last: halved, every key is below this one
            keys[np.arange(width) >= sizes[:, None]] = np.iinfo(np.uint64).max
        ranked = np.argsort(keys, axis=1)
        arrived = (ranked + starts[:, None]).reshape(-1)
        rows = rows[arrived if full else arrived[slots]]

    mask = None if full else torch.from_numpy(np.arange(width) < sizes[:, None]).to(device)
    rows, slots, sizes = (torch.from_numpy(array).to(device) for array in (rows, slots, sizes))
    return Groups(labels=uniques, sizes=sizes, rows=rows, slots=slots, mask=mask, width=width)


def _hash(labels: np.ndarray) -> np.ndarray:
    """A 64-bit hash of every label, the same in every process (Python's own hash of a string is not)."""
    import pandas as pd

    return pd.util.hash_array(np.asarray(labels, dtype=object), categorize=False)


def _mix(seeds: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Output `numbers` of the SplitMix64 generators with these seeds (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = seeds + (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
