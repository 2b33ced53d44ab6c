"""Q and R of a local-level model by the method of moments, from the autocovariance of the first differences.

d_t = z_t - z_{t-1} = w_t + v_t - v_{t-1},    E d_t^2 = Q + 2R,    E d_t d_{t+1} = -R    (Harvey 1989, section 2.4)
"""

from typing import NamedTuple

import torch


class Noise(NamedTuple):
    """Q and R in squared units of the observations."""

    process_var: float
    measurement_var: float


def of_differences(observations: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    """E d_t^2 and E d_t d_{t+1} over all rows of observations (rows, tokens), mask bool; 0 where there is nothing.

    Only neighbouring columns that are both observed count as a difference.
    """
    pair = mask[:, 1:] & mask[:, :-1]
    d = (observations[:, 1:] - observations[:, :-1]).detach().masked_fill_(~pair, 0)
    sums = d.square().sum(), (d[:, 1:] * d[:, :-1]).sum()
    counts = torch.count_nonzero(pair), torch.count_nonzero(pair[:, 1:] & pair[:, :-1])
    square, product, pairs, triples = torch.stack([s.double() for s in (*sums, *counts)]).tolist()
    return square / max(1.0, pairs), product / max(1.0, triples)


def from_differences(
    observations: torch.Tensor, mask: torch.Tensor, *, smallest_ratio: float = 0.0, largest_ratio: float = 1.0
) -> Noise | None:
    """One Q and one R for all rows of observations (rows, tokens), mask bool; None if all differences are 0.

    Q/R is kept within [smallest_ratio, largest_ratio], R then being the one that explains E d_t^2. A sample of n
    differences knows Q/R to about 3 / sqrt(n): what is smaller ends at the lower bound as often as not.
    """
    variance, covariance = of_differences(observations, mask)
    if variance == 0:
        return None
    ratio = (variance + 2 * covariance) / -covariance if covariance < 0 else largest_ratio
    ratio = max(smallest_ratio, min(ratio, largest_ratio))
    measurement_var = variance / (2 + ratio)
    return Noise(ratio * measurement_var, measurement_var)
