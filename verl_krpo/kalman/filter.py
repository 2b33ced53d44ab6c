"""Kalman filter, smoother and leave-one-out of the local-level model: step by step over time, all rows at once.

For short rows, such as the rewards of a group, each with a model of its own. Long rows of one model: sequence.py.

    x_i = x_{i-1} + w_i,  w_i ~ N(0, Q)        z_i = x_i + v_i,  v_i ~ N(0, R)        x_0 ~ N(m0, P0)

Every function takes

    observations   (rows, time), any real dtype
    mask           (rows, time), bool or 0/1, true where something was observed; None: everywhere
    model          LocalLevel, its parameters numbers or (rows,) tensors

and returns float64. A masked position is no observation and no step of time: nothing there is read, the state does not
drift, and `filtered` and `smoothed` give the belief about the last observed state before it (or x_0). Gradients flow.
ValueError names a wrong argument.
"""

import dataclasses
import math

import torch

from verl_krpo.kalman.local_level import Belief, LocalLevel

Mask = torch.Tensor | None


def filtered(observations: torch.Tensor, mask: Mask, model: LocalLevel) -> Belief:
    """x_{i|i}, P_{i|i}: the state given the observations up to and including position i, (rows, time)."""
    mean, var = _states(observations, mask, model)
    return Belief(mean[:, 1:], var[:, 1:])


def predicted(observations: torch.Tensor, mask: Mask, model: LocalLevel) -> Belief:
    """x_{i|i-1}, P_{i|i-1}: the state at i given the observations before position i, (rows, time).

    At a masked position: the prediction of the next observation's state.
    """
    return _ahead(_states(observations, mask, model), model)


def innovations(observations: torch.Tensor, mask: Mask, model: LocalLevel) -> Belief:
    """z_i - x_{i|i-1} and its variance P_{i|i-1} + R, (rows, time); both 0 at masked positions."""
    z, mask = _observed(observations, mask)
    mean, var = predicted(z, mask, model)
    _, measurement_var, *_ = model.columns(len(z), z.device)
    return Belief(torch.where(mask, z - mean, 0.0), torch.where(mask, var + measurement_var[:, None], 0.0))


def posterior(observations: torch.Tensor, mask: Mask, model: LocalLevel) -> Belief:
    """x_{n|n}, P_{n|n}: the state after a row's last observation, (rows,)."""
    mean, var = _states(observations, mask, model)
    return Belief(mean[:, -1], var[:, -1])


def smoothed(observations: torch.Tensor, mask: Mask, model: LocalLevel) -> Belief:
    """x_{i|n}, P_{i|n}: the state at i given every observation of the row, (rows, time).

    What is known up to i and what is known from i + 1 on are independent beliefs about x_i: their product (Fraser and
    Potter 1969, the two-filter smoother).
    """
    return _product(filtered(observations, mask, model), _from_the_right(observations, mask, model))


def leave_one_out(observations: torch.Tensor, mask: Mask, model: LocalLevel) -> Belief:
    """The state at i given every observation of the row but z_i, (rows, time): predictions from both sides.

    A row's only observation gets (m0, P0 + Q). A masked position leaves nothing out: it gets the smoothed belief.
    """
    states = _states(observations, mask, model)
    left = _ahead(states, model)
    if mask is not None:
        seen, (mean, var) = mask.bool(), states
        left = Belief(torch.where(seen, left.mean, mean[:, 1:]), torch.where(seen, left.var, var[:, 1:]))
    return _product(left, _from_the_right(observations, mask, model))


def log_likelihood(observations: torch.Tensor, mask: Mask, model: LocalLevel) -> torch.Tensor:
    """log p(z_1..z_n) = -1/2 sum_i (log 2 pi S_i + (z_i - x_{i|i-1})^2 / S_i), S_i = P_{i|i-1} + R: (rows,).

    With a diffuse prior the first observation adds -1/2 log 2 pi (Durbin and Koopman 2012, section 7.2.2).
    """
    _, mask = _observed(observations, mask)
    error, var = innovations(observations, mask, model)
    regular = mask & var.isfinite()
    scale = torch.where(regular, var, 1.0)
    terms = math.log(2 * math.pi) + scale.log() + torch.where(regular, error, 0.0) ** 2 / scale
    return -0.5 * (terms * mask).sum(dim=1)


def _states(observations: torch.Tensor, mask: Mask, model: LocalLevel) -> Belief:
    """The state before the first position, after the first, ..., after the last: (rows, time + 1)."""
    z, mask = _observed(observations, mask)
    process_var, measurement_var, mean, var = model.columns(len(z), z.device)
    means, variances = [mean], [var]
    for value, observed in zip(z.unbind(1), mask.unbind(1), strict=True):
        predicted_var = var + process_var
        gain = torch.where(observed, 1 / (1 + measurement_var / predicted_var), 0.0)  # P / (P + R), also for P = inf
        mean = torch.lerp(mean, value, gain)
        var = torch.where(observed, measurement_var * gain, var)
        means.append(mean)
        variances.append(var)
    return Belief(torch.stack(means, dim=1), torch.stack(variances, dim=1))


def _ahead(states: Belief, model: LocalLevel) -> Belief:
    """The prediction from each of the states but the last: (rows, time)."""
    process_var, *_ = model.columns(len(states.mean), states.mean.device)
    return Belief(states.mean[:, :-1], states.var[:, :-1] + process_var[:, None])


def _from_the_right(observations: torch.Tensor, mask: Mask, model: LocalLevel) -> Belief:
    """The state at i given the observations after i: a random walk looks the same backwards, from a diffuse prior."""
    diffuse = dataclasses.replace(model, init_var=math.inf)
    mean, var = predicted(observations.flip(1), None if mask is None else mask.flip(1), diffuse)
    return Belief(mean.flip(1), var.flip(1))


def _product(a: Belief, b: Belief) -> Belief:
    """The belief that holds what two independent ones know; variances may be 0 or inf."""
    weight = torch.where(a.var == b.var, 0.5, 1 / (1 + b.var / a.var))
    return Belief(torch.lerp(a.mean, b.mean, weight), 1 / (1 / a.var + 1 / b.var))


def _observed(observations: torch.Tensor, mask: Mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Observations in float64, 0 under the mask, and the mask as bool; ValueError for a wrong shape or value."""
    if observations.ndim != 2 or observations.is_complex():
        shape = f"{tuple(observations.shape)} of {observations.dtype}"
        raise ValueError(f"observations must be a real (rows, time) tensor, got {shape}")
    mask = torch.ones_like(observations, dtype=torch.bool) if mask is None else check_mask(mask, observations)
    return torch.where(mask, observations, 0).double(), mask


def check_mask(mask: torch.Tensor, observations: torch.Tensor) -> torch.Tensor:
    """The mask as bool; ValueError where its shape is not that of the observations, or a value neither 0 nor 1."""
    if mask.shape != observations.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, observations {tuple(observations.shape)}")
    if mask.dtype != torch.bool and (wrong := (mask != 0) & (mask != 1)).any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(f"mask={mask[row, column].item()} in row {row}, column {column}: must be bool or 0/1")
    return mask.bool()
