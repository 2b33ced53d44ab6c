"""The same beliefs, one observation after the other in float64: slow, plain, the oracle of the tests.

Names and arguments are those of filter.py; only conventions are shared with it, no formula: gains come from the Riccati
recursion, the smoother from Rauch, Tung and Striebel in their own form, leave-one-out by filtering the row again with
that observation missing but time going on. P0 = inf is written out where it occurs.
"""

import math

import torch

from verl_krpo.kalman.filter import Belief


def _rows(observations, mask, process_var, measurement_var, init_mean, init_var):
    batch, time = observations.shape
    mask = torch.ones(batch, time) if mask is None else mask
    parameters = [
        torch.as_tensor(v, dtype=torch.float64).expand(batch).tolist()
        for v in (process_var, measurement_var, init_mean, init_var)
    ]
    for row in range(batch):
        seen = [bool(m) for m in mask[row].tolist()]
        z = [v for v, m in zip(observations[row].double().tolist(), seen, strict=True) if m]
        yield z, seen, *(p[row] for p in parameters)


def _step(mean, var, z, process_var, measurement_var):
    """One prediction and one update; z None: the observation is missing."""
    var = var + process_var
    if z is None or var == 0:
        return mean, var
    if math.isinf(var):
        return z, measurement_var
    gain = var / (var + measurement_var)
    return mean + gain * (z - mean), var * measurement_var / (var + measurement_var)


def _states(z, process_var, measurement_var, init_mean, init_var):
    states = [(init_mean, init_var)]
    for value in z:
        states.append(_step(*states[-1], value, process_var, measurement_var))
    return states


def _smooth(z, process_var, measurement_var, init_mean, init_var):
    states = _states(z, process_var, measurement_var, init_mean, init_var)
    out = [states[-1]]
    for mean, var in reversed(states[:-1]):
        next_mean, next_var = out[-1]
        ahead = var + process_var
        if math.isinf(var):
            out.append((next_mean, next_var + process_var))
        elif ahead == 0:
            out.append((mean, 0.0))
        else:
            c = var / ahead
            out.append((mean + c * (next_mean - mean), var + c * c * (next_var - ahead)))
    return out[::-1]


def _at(states, seen):
    """The state after the last observation up to each position."""
    out, index = [], 0
    for observed in seen:
        index += observed
        out.append(states[index])
    return out


def _belief(rows, observations) -> Belief:
    dtype = torch.float64 if observations.dtype == torch.float64 else torch.float32
    table = torch.tensor(list(rows), dtype=torch.float64).reshape(*observations.shape, 2).to(dtype)
    return Belief(table[..., 0], table[..., 1])


def filtered(observations, mask=None, *, process_var, measurement_var, init_mean=0.0, init_var=0.0) -> Belief:
    rows = []
    for z, seen, *p in _rows(observations, mask, process_var, measurement_var, init_mean, init_var):
        rows.append(_at(_states(z, *p), seen))
    return _belief(rows, observations)


def predicted(observations, mask=None, *, process_var, measurement_var, init_mean=0.0, init_var=0.0) -> Belief:
    rows = []
    for z, seen, *p in _rows(observations, mask, process_var, measurement_var, init_mean, init_var):
        states, index, row = _states(z, *p), 0, []
        for observed in seen:
            row.append((states[index][0], states[index][1] + p[0]))
            index += observed
        rows.append(row)
    return _belief(rows, observations)


def innovations(observations, mask=None, *, process_var, measurement_var, init_mean=0.0, init_var=0.0) -> Belief:
    rows = []
    for z, seen, *p in _rows(observations, mask, process_var, measurement_var, init_mean, init_var):
        states, index, row = _states(z, *p), 0, []
        for observed in seen:
            row.append((z[index] - states[index][0], states[index][1] + p[0] + p[1]) if observed else (0.0, 0.0))
            index += observed
        rows.append(row)
    return _belief(rows, observations)


def posterior(observations, mask=None, *, process_var, measurement_var, init_mean=0.0, init_var=0.0) -> Belief:
    rows = [
        [_states(z, *p)[-1]]
        for z, _, *p in _rows(observations, mask, process_var, measurement_var, init_mean, init_var)
    ]
    mean, var = _belief(rows, observations.new_zeros(len(rows), 1))
    return Belief(mean[:, 0], var[:, 0])


def smoothed(observations, mask=None, *, process_var, measurement_var, init_mean=0.0, init_var=0.0) -> Belief:
    rows = []
    for z, seen, *p in _rows(observations, mask, process_var, measurement_var, init_mean, init_var):
        rows.append(_at(_smooth(z, *p), seen))
    return _belief(rows, observations)


def leave_one_out(observations, mask=None, *, process_var, measurement_var, init_mean=0.0, init_var=0.0) -> Belief:
    rows = []
    for z, seen, *p in _rows(observations, mask, process_var, measurement_var, init_mean, init_var):
        rest, index, row = _at(_smooth(z, *p), seen), 0, []
        for position, observed in enumerate(seen):
            if observed:
                row.append(_smooth([None if i == index else v for i, v in enumerate(z)], *p)[index + 1])
                index += 1
            else:
                row.append(rest[position])
        rows.append(row)
    return _belief(rows, observations)


def log_likelihood(observations, mask=None, *, process_var, measurement_var, init_mean=0.0, init_var=0.0):
    out = []
    for z, _, *p in _rows(observations, mask, process_var, measurement_var, init_mean, init_var):
        total = 0.0
        for value, (mean, var) in zip(z, _states(z, *p), strict=False):
            s = var + p[0] + p[1]
            if math.isinf(s):
                total -= 0.5 * math.log(2 * math.pi)
            elif s > 0:
                total -= 0.5 * (math.log(2 * math.pi * s) + (value - mean) ** 2 / s)
        out.append(total)
    return torch.tensor(out, dtype=torch.float64 if observations.dtype == torch.float64 else torch.float32)


def filtered_mean(
    observations, mask=None, *, process_var, measurement_var, init_mean=0.0, init_var=0.0, gain="scheduled"
) -> torch.Tensor:
    if gain == "scheduled":
        return filtered(
            observations,
            mask,
            process_var=process_var,
            measurement_var=measurement_var,
            init_mean=init_mean,
            init_var=init_var,
        ).mean
    root = math.sqrt(process_var) * math.sqrt(process_var + 4 * measurement_var)
    steady = 2 * process_var / (process_var + root) if process_var else 0.0
    rows = []
    for z, seen, *_ in _rows(observations, mask, process_var, measurement_var, init_mean, init_var):
        states = [(init_mean, 0.0)]
        for value in z:
            states.append((states[-1][0] + steady * (value - states[-1][0]), 0.0))
        rows.append(_at(states, seen))
    return _belief(rows, observations).mean
