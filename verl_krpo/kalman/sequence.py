"""The filtered mean of long rows, whose observations all follow one model with numbers as parameters.

As a scan, since step by step (filter.py) 131,072 tokens take seconds.

x_t = x_{t-1} + K_t (z_t - x_{t-1}) = (1 - K_t) x_{t-1} + K_t z_t
"""

import functools

import torch

from verl_krpo.kalman import scan
from verl_krpo.kalman.filter import check_mask
from verl_krpo.kalman.local_level import LocalLevel, gains, steady_gain


def filtered_mean(
    observations: torch.Tensor, mask: torch.Tensor | None, model: LocalLevel, gain: str = "scheduled"
) -> torch.Tensor:
    """x_{t|t}, (rows, time), in float32 (float64 for float64 observations).

    observations, mask: as in `filter`. gain: `scheduled`, the exact K_1, K_2, ...; `steady`, their limit everywhere.
    ValueError names a wrong argument.
    """
    dtype = torch.promote_types(observations.dtype, torch.float32)
    packed, rank = pack(observations, mask)
    *_, init_mean, _ = model.numbers()
    initial = torch.full((len(packed),), init_mean, dtype=torch.float64, device=packed.device)
    windows = _windows(model, gain, power_of_two(packed.shape[1]), packed.device)
    return unpack(scan.solve(windows, packed, initial, dtype), rank, init_mean)


def schedule(model: LocalLevel, gain: str, n: int) -> torch.Tensor:
    """The gains K_1 .. K_n in use, (n,) float64."""
    if gain not in ("scheduled", "steady"):
        raise ValueError(f"gain={gain!r} must be scheduled or steady")
    return gains(model, n) if gain == "scheduled" else torch.full((n,), steady_gain(model), dtype=torch.float64)


def power_of_two(n: int) -> int:
    """The next power of two from n on: one cached schedule then serves batches of many widths."""
    return 1 << max(n - 1, 0).bit_length()


def pack(observations: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Observations moved to the left of their rows, and how many there are up to and including each position.

    Both (rows, time). Without a mask nothing moves.
    """
    if mask is None:
        return observations, None
    mask = check_mask(mask, observations)
    rank = mask.cumsum(dim=1)
    # Column 0 takes what is masked, and is dropped.
    packed = observations.new_zeros(len(mask), mask.shape[1] + 1).scatter(1, rank * mask, observations)
    return packed[:, 1:], rank


def unpack(packed: torch.Tensor, rank: torch.Tensor | None, before: float) -> torch.Tensor:
    """The way back: a position gets the entry of its rank, `before` where that is 0."""
    return packed if rank is None else torch.nn.functional.pad(packed, (1, 0), value=before).gather(1, rank)


@functools.lru_cache(maxsize=16)
def _windows(model: LocalLevel, gain: str, n: int, device: torch.device) -> list[scan.Window]:
    weight = schedule(model, gain, n)[None]
    return [(scaled.to(device), product.to(device)) for scaled, product in scan.windows(1 - weight, weight)]
