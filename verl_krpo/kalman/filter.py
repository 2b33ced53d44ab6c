"""Kalman filter, smoother and leave-one-out of the local-level model: step by step over time, all rows at once.

For short rows, such as the rewards of a group, each with a model of its own. Long rows of one model: sequence.py.

    x_i = x_{i-1} + w_i,  w_i ~ N(0, Q)        z_i = x_i + v_i,  v_i ~ N(0, R)        x_0 ~ N(m0, P0)

Every function takes

    observations   (rows, time), any real dtype
    mask           (rows, time), bool or 0/1, true where something was observed; None: everywhere
    model          LocalLevel, its parameters numbers or (rows,) tensors
    weights        (rows, time) >= 0, a noise of its own for every observation, v_i ~ N(0, R / w_i): one of weight 0
                   tells nothing, but is a step of time; None: R everywhere

and returns float64. A masked position is no observation and no step of time: nothing there is read, the state does not
drift, and `filtered` and `smoothed` give the belief about the last observed state before it (or x_0). Gradients flow.
ValueError names a wrong argument.
"""

import dataclasses
import math

import torch

from verl_krpo.kalman.local_level import Belief, LocalLevel

Mask = torch.Tensor | None
Weights = torch.Tensor | None


def filtered(observations: torch.Tensor, mask: Mask, model: LocalLevel, weights: Weights = None) -> Belief:
    """x_{i|i}, P_{i|i}: the state given the observations up to and including position i, (rows, time)."""
    mean, var = _states(observations, mask, model, weights)
    return Belief(mean[:, 1:], var[:, 1:])


def predicted(observations: torch.Tensor, mask: Mask, model: LocalLevel, weights: Weights = None) -> Belief:
    """x_{i|i-1}, P_{i|i-1}: the state at i given the observations before position i, (rows, time).

    At a masked position: the prediction of the next observation's state.
    """
    return _ahead(_states(observations, mask, model, weights), model)


def innovations(observations: torch.Tensor, mask: Mask, model: LocalLevel, weights: Weights = None) -> Belief:
    """z_i - x_{i|i-1} and its variance P_{i|i-1} + R / w_i, (rows, time); both 0 at masked positions."""
    z, mask, noise_var = _observed(observations, mask, model, weights)
    mean, var = predicted(z, mask, model, weights)
    return Belief(torch.where(mask, z - mean, 0.0), torch.where(mask, var + noise_var, 0.0))


def posterior(observations: torch.Tensor, mask: Mask, model: LocalLevel, weights: Weights = None) -> Belief:
    """x_{n|n}, P_{n|n}: the state after a row's last observation, (rows,)."""
    mean, var = _states(observations, mask, model, weights)
    return Belief(mean[:, -1], var[:, -1])


def smoothed(observations: torch.Tensor, mask: Mask, model: LocalLevel, weights: Weights = None) -> Belief:
    """x_{i|n}, P_{i|n}: the state at i given every observation of the row, (rows, time).

    What is known up to i and what is known from i + 1 on are independent beliefs about x_i: their product (Fraser and
    Potter 1969, the two-filter smoother).
    """
    left = filtered(observations, mask, model, weights)
    return _product(left, _from_the_right(observations, mask, model, weights))


def leave_one_out(observations: torch.Tensor, mask: Mask, model: LocalLevel, weights: Weights = None) -> Belief:
    """The state at i given every observation of the row but z_i, (rows, time): predictions from both sides.

    A row's only observation gets (m0, P0 + Q). A masked position leaves nothing out: it gets the smoothed belief.
    """
    states = _states(observations, mask, model, weights)
    left = _ahead(states, model)
    if mask is not None:
        seen, (mean, var) = mask.bool(), states
        left = Belief(torch.where(seen, left.mean, mean[:, 1:]), torch.where(seen, left.var, var[:, 1:]))
    return _product(left, _from_the_right(observations, mask, model, weights))


def log_likelihood(observations: torch.Tensor, mask: Mask, model: LocalLevel) -> torch.Tensor:
    """log p(z_1..z_n) = -1/2 sum_i (log 2 pi S_i + (z_i - x_{i|i-1})^2 / S_i), S_i = P_{i|i-1} + R: (rows,).

    With a diffuse prior the first observation adds -1/2 log 2 pi (Durbin and Koopman 2012, section 7.2.2).
    """
    error, var = innovations(observations, mask, model)
    mask = torch.ones_like(var, dtype=torch.bool) if mask is None else mask.bool()
    regular = mask & var.isfinite()
    scale = torch.where(regular, var, 1.0)
    terms = math.log(2 * math.pi) + scale.log() + torch.where(regular, error, 0.0) ** 2 / scale
    return -0.5 * (terms * mask).sum(dim=1)


def _states(observations: torch.Tensor, mask: Mask, model: LocalLevel, weights: Weights = None) -> Belief:
    """The state before the first position, after the first, ..., after the last: (rows, time + 1)."""
    z, mask, noise_var = _observed(observations, mask, model, weights)
    process_var, _, mean, var = model.columns(len(z), z.device)
    means, variances = [mean], [var]
    for value, noise, observed in zip(z.unbind(1), noise_var.unbind(1), mask.unbind(1), strict=True):
        predicted_var = torch.where(observed, var + process_var, var)
        telling = observed & noise.isfinite()
        gain = torch.where(telling, 1 / (1 + noise / predicted_var), 0.0)  # P / (P + R), also for P = inf
        mean = torch.lerp(mean, value, gain)
        var = torch.where(telling, noise * gain, predicted_var)
        means.append(mean)
        variances.append(var)
    return Belief(torch.stack(means, dim=1), torch.stack(variances, dim=1))


def _ahead(states: Belief, model: LocalLevel) -> Belief:
    """The prediction from each of the states but the last: (rows, time)."""
    process_var, *_ = model.columns(len(states.mean), states.mean.device)
    return Belief(states.mean[:, :-1], states.var[:, :-1] + process_var[:, None])


def _from_the_right(observations: torch.Tensor, mask: Mask, model: LocalLevel, weights: Weights) -> Belief:
    """The state at i given the observations after i: a random walk looks the same backwards, from a diffuse prior."""
    diffuse = dataclasses.replace(model, init_var=math.inf)
    mask, weights = (x if x is None else x.flip(1) for x in (mask, weights))
    mean, var = predicted(observations.flip(1), mask, diffuse, weights)
    return Belief(mean.flip(1), var.flip(1))


def _product(a: Belief, b: Belief) -> Belief:
    """The belief that holds what two independent ones know; variances may be 0 or inf."""
    weight = torch.where(a.var == b.var, 0.5, 1 / (1 + b.var / a.var))
    return Belief(torch.lerp(a.mean, b.mean, weight), 1 / (1 / a.var + 1 / b.var))


def _observed(
    observations: torch.Tensor, mask: Mask, model: LocalLevel, weights: Weights
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Observations in float64, 0 under the mask; the mask as bool; R / w_i. ValueError for a wrong shape or value."""
    if observations.ndim != 2 or observations.is_complex():
        shape = f"{tuple(observations.shape)} of {observations.dtype}"
        raise ValueError(f"observations must be a real (rows, time) tensor, got {shape}")
    mask = torch.ones_like(observations, dtype=torch.bool) if mask is None else check_mask(mask, observations)
    z = torch.where(mask, observations, 0).double()
    _, measurement_var, *_ = model.columns(len(z), z.device)
    noise_var = measurement_var[:, None].expand_as(z)
    return z, mask, noise_var if weights is None else noise_var / _check_weights(weights, mask)


def check_mask(mask: torch.Tensor, observations: torch.Tensor) -> torch.Tensor:
    """The mask as bool; ValueError where its shape is not that of the observations, or a value neither 0 nor 1."""
    if mask.shape != observations.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, observations {tuple(observations.shape)}")
    if mask.dtype != torch.bool and (wrong := (mask != 0) & (mask != 1)).any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(f"mask={mask[row, column].item()} in row {row}, column {column}: must be bool or 0/1")
    return mask.bool()


def _check_weights(weights: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The weights in float64, 1 under the mask; ValueError for a wrong shape, or one that is negative or not finite."""
    if weights.shape != mask.shape:
        raise ValueError(f"weights have shape {tuple(weights.shape)}, observations {tuple(mask.shape)}")
    weights = torch.where(mask, weights, 1).double()
    if (wrong := ~((weights >= 0) & weights.isfinite())).any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"weights={weights[row, column].item()} in row {row}, column {column}: must be finite and >= 0"
        )
    return weights
