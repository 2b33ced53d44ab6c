"""Q, R and the prior of the local-level model from data: by moments, or by exact maximum likelihood.

Rows are independent runs of one model, so every row has its say in the one set of parameters that is returned.
"""

import math
from typing import NamedTuple

import torch

from verl_krpo.kalman import filter as kalman
from verl_krpo.kalman import moments

DECADES = 12  # the likelihood is searched for Q/R and P0/R in 10^-12..10^12, and at 0
SIDE = 9  # candidates a side of the search grid
BLOCK = 1 << 20  # elements that are filtered at a time


class Noise(NamedTuple):
    """Q, R, m0, P0: floats, in the observations' units (the mean) or their squares."""

    process_var: float
    measurement_var: float
    init_mean: float
    init_var: float


def by_moments(observations: torch.Tensor, mask: torch.Tensor | None = None) -> Noise:
    """Q, R, m0, P0 from second moments (Harvey 1989, section 2.4, for Q and R).

        d_i = z_{i+1} - z_i:  E d_i^2 = Q + 2R,  E d_i d_{i+1} = -R        E z_1 = m0,  E (z_1 - m0)^2 = P0 + Q + R

    What comes out negative is set to 0, R then being what explains E d_i^2. observations: (batch, time); mask as in
    `kalman.filter`. Quick and consistent, but rough on few data. ValueError without a row of two observations.
    """
    z, seen = _packed(observations, mask)
    variance, covariance = moments.of_differences(z, seen)
    measurement_var = min(max(-covariance, 0.0), variance / 2)
    process_var = variance - 2 * measurement_var

    first = z[seen[:, 0], 0]
    init_var = (first.var(correction=0) - process_var - measurement_var).clamp(min=0)
    return Noise(process_var, measurement_var, float(first.mean()), float(init_var))


def by_likelihood(observations: torch.Tensor, mask: torch.Tensor | None = None) -> Noise:
    """The Q, R, m0, P0 that maximise the summed `kalman.filter.log_likelihood` of the rows.

    m0 and R maximise it in closed form given Q/R and P0/R; these two are searched on a grid that closes in on the best
    point, to a relative precision of about 1e-3, zeros included. observations: (batch, time); mask as in
    `kalman.filter`. ValueError without a row of two observations, or if all observations are equal.
    """
    z, seen = _packed(observations, mask)
    if bool((z[seen] == z[seen][0]).all()):
        raise ValueError(f"observations are all {z[seen][0].item()}: the likelihood has no maximum")
    center, reach = torch.zeros(2, dtype=torch.float64), float(DECADES)
    best = (-math.inf, None, None)
    while reach > 5e-4:
        step = torch.linspace(-reach, reach, SIDE, dtype=torch.float64)
        grid = (center + torch.cartesian_prod(step, step)).clamp(-DECADES, DECADES)
        best = max(best, _best(z, seen, 10**grid), key=lambda found: found[0])
        center, reach = best[1].clamp(min=10.0**-DECADES).log10(), reach / 2
    edges = torch.stack([best[1] * torch.tensor(keep) for keep in ([0.0, 1.0], [1.0, 0.0], [0.0, 0.0])])
    best = max(_best(z, seen, edges), best, key=lambda found: found[0])
    (process_ratio, init_ratio), (mean, measurement_var) = best[1].tolist(), best[2].tolist()
    return Noise(process_ratio * measurement_var, measurement_var, mean, init_ratio * measurement_var)


def _packed(observations: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Observations at the left of their rows, float64, 0 behind the last; and where they are."""
    packed = kalman._pack(observations.detach(), mask, 1.0, 1.0, 0.0, 0.0)
    z = packed.values.to(torch.float64)
    seen = (torch.arange(z.shape[1], device=z.device) < packed.count[:, None]).expand(z.shape)
    if not seen[:, 1:].any():
        raise ValueError(f"observations of shape {tuple(observations.shape)} have no row with two observations")
    return z, seen


def _best(z: torch.Tensor, seen: torch.Tensor, ratios: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
    """(log-likelihood, its Q/R and P0/R, its m0 and R): the best of ratios (candidates, 2), m0 and R profiled out.

    Innovations are linear: for prior mean m they are e_i - m u_i, with e_i those of the data and u_i those of a row of
    ones, both from a prior mean of 0.
    """
    batch, n = z.shape
    best = (-math.inf, None, None)
    size = max(1, BLOCK // z.numel())
    for some in ratios.to(z.device).split(size):
        count = len(some)
        rows = torch.stack([z, seen.to(z.dtype)]).expand(count, 2, batch, n).reshape(-1, n)
        q, p = (column.repeat_interleave(2 * batch) for column in some.unbind(1))
        shown = seen.expand(count, 2, batch, n).reshape(-1, n)
        error, var = kalman.innovations(rows, shown, process_var=q, measurement_var=1.0, init_var=p)
        error, unit = error.view(count, 2, -1).unbind(1)
        var = torch.where(seen.reshape(-1), var.view(count, 2, -1)[:, 0], 1.0)
        mean = (error * unit / var).sum(dim=1) / (unit.square() / var).sum(dim=1)
        total = seen.sum()
        scale = ((error - mean[:, None] * unit).square() / var).sum(dim=1) / total
        likelihood = -0.5 * (total * (2 * math.pi * scale).log() + var.log().sum(dim=1) + total)
        index = int(likelihood.argmax())
        found = (likelihood[index].item(), some[index].cpu(), torch.stack([mean[index], scale[index]]).cpu())
        best = max(best, found, key=lambda candidate: candidate[0])
    return best
