"""The local-level model: what its filter knows before it has seen any data.

    x_i = x_{i-1} + w_i,  w_i ~ N(0, Q)        z_i = x_i + v_i,  v_i ~ N(0, R)        x_0 ~ N(m0, P0)

Gains and variances depend on Q, R, P0 and the number of observations only. Their Riccati recursion

    P_{i|i-1} = P_{i-1|i-1} + Q,   K_i = P_{i|i-1} / (P_{i|i-1} + R),   P_{i|i} = (1 - K_i) P_{i|i-1} = R K_i

has a closed form in which every term is positive, so nothing cancels. With q = Q/R, p = P0/R, h = sqrt(q),
eta = 2 asinh(h/2), g = exp(eta/2), rho = exp(-2 eta i) and S = (1 - rho)/h (2i where q = 0):

    K_i = (p (1/g + g rho) + q S) / (p S + g + rho/g)
"""

import functools
import math
from typing import NamedTuple

import torch

LARGEST_RATIO = 1e300  # Q/R beyond this has the same gains in float64


class Schedule(NamedTuple):
    """gain K_i, filtered_var P_{i|i}, predicted_var P_{i|i-1} for i = 1..n: float64, (n,) or (batch, n)."""

    gain: torch.Tensor
    filtered_var: torch.Tensor
    predicted_var: torch.Tensor


def check_variance(name: str, value: float | torch.Tensor, *, infinite: bool = False) -> None:
    """ValueError unless every entry of `value` is >= 0 and finite (or inf too where `infinite`)."""
    rule = "must be >= 0 (inf: diffuse)" if infinite else "must be a finite number >= 0"
    if not isinstance(value, torch.Tensor):
        if not (value >= 0 and (infinite or value < math.inf)):
            raise ValueError(f"{name}={value} {rule}")
        return
    if value.ndim > 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: give a number or one value a row, (batch,)")
    if value.numel() == 0 or (value.amin() >= 0 and (infinite or value.amax() < math.inf)):  # not if there is a NaN
        return
    wrong = ~((value >= 0) & (infinite | value.isfinite()))
    row = int(wrong.reshape(-1).nonzero()[0])
    raise ValueError(f"{name}={value.reshape(-1)[row].item()} in row {row} {rule}")


def schedule(
    n: int,
    process_var: float | torch.Tensor,
    measurement_var: float | torch.Tensor,
    init_var: float | torch.Tensor,
) -> Schedule:
    """Gains and variances of the first n observations.

    process_var Q, measurement_var R, init_var P0 (>= 0, squared units of the observations; P0 may be inf) are numbers,
    giving (n,) tensors that are cached and must not be written to, or (batch,) tensors, giving (batch, n).
    Where P_{i|i-1} = R = 0 the state is known already and the gain is 0.
    """
    check_variance("process_var", process_var)
    check_variance("measurement_var", measurement_var)
    check_variance("init_var", init_var, infinite=True)
    if n < 0:
        raise ValueError(f"n={n} must be >= 0")
    variances = (process_var, measurement_var, init_var)
    tensors = [v for v in variances if isinstance(v, torch.Tensor) and v.ndim > 0]
    if not tensors:
        return _scalar_schedule(n, *(float(v) for v in variances))
    device = tensors[0].device
    return _schedule(
        n, *(torch.as_tensor(v, dtype=torch.float64, device=device).detach()[..., None] for v in variances)
    )


@functools.lru_cache(maxsize=32)
def _scalar_schedule(n: int, process_var: float, measurement_var: float, init_var: float) -> Schedule:
    return _schedule(n, *(torch.tensor(v, dtype=torch.float64) for v in (process_var, measurement_var, init_var)))


def _schedule(n: int, q_var: torch.Tensor, r_var: torch.Tensor, p_var: torch.Tensor) -> Schedule:
    gain, _, predicted_var = window(0, n, q_var, r_var, p_var)
    return Schedule(gain, r_var * gain, predicted_var)


def window(
    start: int, stop: int, process_var: torch.Tensor, measurement_var: torch.Tensor, init_var: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K_i, 1 - K_i and P_{i|i-1} for i = start + 1..stop, (..., stop - start), from float64 scalars or (..., 1)."""
    unit = torch.where(measurement_var > 0, measurement_var, 1.0)
    q = (process_var / unit).clamp(max=LARGEST_RATIO)
    p = init_var / unit
    i = torch.arange(start, stop + 1, dtype=torch.float64, device=q.device)

    h = q.sqrt()
    eta = 2 * torch.asinh(h / 2)
    g = h / 2 + torch.sqrt(1 + q / 4)
    rho = -2 * eta * i
    s = rho.expm1().neg_() / torch.where(q > 0, h, 1.0)
    s += torch.where(q > 0, 0.0, 2.0) * i
    rho.exp_()
    # Numerator and denominator divided by max(p, 1), so that p = inf is the diffuse limit. At i = 0 this is p.
    a, b = p.clamp(max=1.0), 1 / p.clamp(min=1.0)
    gain = torch.addcmul(a / g, rho, a * g).addcmul_(s, b * q)
    gain /= torch.addcmul(b * g, rho, b / g).addcmul_(s, a)

    predicted_var = (measurement_var * gain)[..., :-1]
    if start == 0:
        predicted_var[..., :1] = init_var
    predicted_var += process_var
    keep = measurement_var / (predicted_var + measurement_var)
    gain = gain[..., 1:].clamp_(max=1.0)
    if not measurement_var.all():  # R = 0: what is observed is the state, unless that is known already
        gain = torch.where(measurement_var > 0, gain, (predicted_var > 0).double())
        keep = torch.where(measurement_var + predicted_var > 0, keep, 1.0)
    return gain, keep, predicted_var


def steady_gain(process_var: float, measurement_var: float) -> float:
    """The gain's limit: the root in [0, 1] of K^2 + q K - q = 0, q = Q/R, written K = 2 / (1 + sqrt(1 + 4/q)).

    0 where Q = 0 (also for R = 0, where nothing is left to learn after one observation), 1 where R = 0 < Q.
    """
    check_variance("process_var", process_var)
    check_variance("measurement_var", measurement_var)
    if process_var == 0:
        return 0.0
    return 2.0 / (1.0 + math.sqrt(1.0 + 4.0 * (measurement_var / process_var)))
