"""Q and R of the local-level model from data, by the moments of differences."""

import torch


def by_differences(
    observations: torch.Tensor, mask: torch.Tensor, *, smallest_ratio: float = 0.0
) -> tuple[float, float] | None:
    """(Q, R) for all rows of observations (rows, time), mask bool; None if there is no difference but 0.

        d_t = z_t - z_{t-1} = w_t + v_t - v_{t-1}        E d_t^2 = Q + 2R        E d_t d_{t+1} = -R

    (Harvey 1989, section 2.4). Neighboring columns that are both observed count as a difference. Q/R is kept within
    [smallest_ratio, 1], R then being the one that explains E d_t^2. A sample of n differences knows Q/R to
    about 3 / sqrt(n): what is smaller ends at the lower bound as often as not.
    """
    pair = mask[:, 1:] & mask[:, :-1]
    d = torch.where(pair, observations[:, 1:] - observations[:, :-1], 0).detach()
    sums = d.square().sum(), (d[:, 1:] * d[:, :-1]).sum(), pair.sum(), (pair[:, 1:] & pair[:, :-1]).sum()
    square, product, pairs, triples = torch.stack([value.double() for value in sums]).tolist()
    variance, covariance = square / max(1.0, pairs), product / max(1.0, triples)
    if variance == 0:
        return None
    ratio = (variance + 2 * covariance) / -covariance if covariance < 0 else 1.0
    ratio = max(smallest_ratio, min(ratio, 1.0))
    measurement_var = variance / (2 + ratio)
    return ratio * measurement_var, measurement_var
