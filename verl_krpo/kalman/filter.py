"""Kalman filter, smoother and leave-one-out of the local-level model over (batch, time), with a mask.

    x_i = x_{i-1} + w_i,  w_i ~ N(0, Q)        z_i = x_i + v_i,  v_i ~ N(0, R)        x_0 ~ N(m0, P0)

A masked position is not an observation: state and gain index carry over it, and what stands there is never read. The
belief at a masked position is that of the last observation before it (the prior if there is none).
"""

import functools
import math
from typing import NamedTuple

import torch

from verl_krpo.kalman import local_level, recurrence

HOLES_BLOCK = 1 << 17  # elements that are moved together and back at a time
SHORT = 64  # observations: rows up to here, if they have parameters of their own, are filtered step by step

Number = float | torch.Tensor


class Belief(NamedTuple):
    """Gaussian beliefs about the state: mean and var of one shape."""

    mean: torch.Tensor
    var: torch.Tensor


class _Packed(NamedTuple):
    """Observations moved to the left of their rows, and the way back."""

    values: torch.Tensor  # (batch, n); 0 behind a row's last observation
    rank: torch.Tensor  # (batch or 1, time): how many observations up to and including this position
    mask: torch.Tensor | None  # (batch, time) bool; None: everything was observed
    count: torch.Tensor  # (batch or 1,): observations in the row
    dtype: torch.dtype  # of the result
    parameters: tuple[Number, Number, Number]  # Q, R, P0 as they were given
    process_var: torch.Tensor  # Q, R, m0, P0: (batch or 1, 1) float64
    measurement_var: torch.Tensor
    init_mean: torch.Tensor
    init_var: torch.Tensor


def filtered(
    observations: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    process_var: Number,
    measurement_var: Number,
    init_mean: Number = 0.0,
    init_var: Number = 0.0,
) -> Belief:
    """x_{i|i}, P_{i|i}: the state given the observations up to and including position i.

    observations: (batch, time), any real dtype. mask: (batch, time), bool or 0/1, true where something was observed;
    None: everywhere. process_var Q >= 0, measurement_var R >= 0, init_mean m0, init_var P0 >= 0 (inf: exact diffuse
    limit): numbers, or (batch,) tensors with one value a row. Returns (batch, time) in float32, or float64 if the
    observations are float64. Gradients flow through the observations. ValueError names a bad argument and its value.
    """
    packed = _pack(observations, mask, process_var, measurement_var, init_mean, init_var)
    mean, var = _forward(packed)
    return _belief(packed, mean, var, packed.rank)


def predicted(
    observations: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    process_var: Number,
    measurement_var: Number,
    init_mean: Number = 0.0,
    init_var: Number = 0.0,
) -> Belief:
    """x_{i|i-1}, P_{i|i-1}: the state at i given the observations before position i. Arguments as in `filtered`.

    At a masked position: the prediction for the next observation.
    """
    packed = _pack(observations, mask, process_var, measurement_var, init_mean, init_var)
    mean, var = _forward(packed)
    return _belief(packed, mean, var + packed.process_var, _before(packed))


def innovations(
    observations: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    process_var: Number,
    measurement_var: Number,
    init_mean: Number = 0.0,
    init_var: Number = 0.0,
) -> Belief:
    """z_i - x_{i|i-1} and its variance P_{i|i-1} + R; both 0 at masked positions. Arguments as in `filtered`."""
    packed = _pack(observations, mask, process_var, measurement_var, init_mean, init_var)
    mean, var = _forward(packed)
    mean = _take(packed, mean, _before(packed))
    var = _take(packed, var + packed.process_var + packed.measurement_var, _before(packed))
    if packed.mask is None:
        return Belief((observations - mean).to(packed.dtype), var.to(packed.dtype))
    error = torch.where(packed.mask, observations, 0) - mean
    return Belief(*(torch.where(packed.mask, x, 0).to(packed.dtype) for x in (error, var)))


def posterior(
    observations: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    process_var: Number,
    measurement_var: Number,
    init_mean: Number = 0.0,
    init_var: Number = 0.0,
) -> Belief:
    """x_{n|n}, P_{n|n}: the state after a row's last observation, (batch,). Arguments as in `filtered`."""
    packed = _pack(observations, mask, process_var, measurement_var, init_mean, init_var)
    mean, var = _forward(packed)
    mean, var = _belief(packed, mean, var, packed.count[:, None])
    return Belief(mean[:, 0], var[:, 0])


def smoothed(
    observations: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    process_var: Number,
    measurement_var: Number,
    init_mean: Number = 0.0,
    init_var: Number = 0.0,
) -> Belief:
    """x_{i|n}, P_{i|n}: the state given every observation of the row (Rauch, Tung, Striebel 1965).

        C_i = P_{i|i} / (P_{i|i} + Q)
        x_{i|n} = (1 - C_i) x_{i|i} + C_i x_{i+1|n}        P_{i|n} = (1 - C_i) P_{i|i} + C_i^2 P_{i+1|n}

    Arguments as in `filtered`.
    """
    packed = _pack(observations, mask, process_var, measurement_var, init_mean, init_var)
    return _belief(packed, *_smooth(packed), packed.rank)


def leave_one_out(
    observations: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    process_var: Number,
    measurement_var: Number,
    init_mean: Number = 0.0,
    init_var: Number = 0.0,
) -> Belief:
    """The state at i given every observation of the row but z_i. Arguments as in `filtered`.

    Two predictions of x_i meet, each weighted with the other's variance: the usual one from the left, and one from the
    right, where the filter runs over the reversed row from a diffuse start (a random walk looks the same backwards).
    A row's only observation gets (m0, P0 + Q). A masked position leaves nothing out: it gets the smoothed belief.
    """
    packed = _pack(observations, mask, process_var, measurement_var, init_mean, init_var)
    n = packed.values.shape[1]
    left = _forward(packed)
    # Of column i: the number of observations to its right. It is also the column of its mirror image.
    right = (packed.count[:, None] - 1 - torch.arange(n, device=left.mean.device)).clamp(min=0)
    mean, var = _forward(_diffuse(packed, packed.values.gather(1, right.expand(packed.values.shape))))
    mean, var = _take(packed, mean, right), _take(packed, var, right).add_(packed.process_var)

    left_var = left.var[:, :-1] + packed.process_var
    mean = torch.lerp(left.mean[:, :-1], mean, _share(left_var, var).expand(mean.shape))
    var = _parallel(left_var, var)
    if packed.mask is None:
        return Belief(mean.to(packed.dtype), var.expand(mean.shape).to(packed.dtype))
    others = _belief(packed, *_smooth(packed), packed.rank)
    if n == 0:
        return others
    own = _belief(packed, mean, var, _before(packed).clamp(max=n - 1))
    return Belief(*(torch.where(packed.mask, a, b) for a, b in zip(own, others, strict=True)))


def log_likelihood(
    observations: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    process_var: Number,
    measurement_var: Number,
    init_mean: Number = 0.0,
    init_var: Number = 0.0,
) -> torch.Tensor:
    """log p(z_1..z_n) = -1/2 sum_i (log 2 pi S_i + (z_i - x_{i|i-1})^2 / S_i), S_i = P_{i|i-1} + R: (batch,).

    With a diffuse prior the first observation adds -1/2 log 2 pi (Durbin and Koopman 2012, section 7.2.2). An
    observation that was certain (S_i = 0) adds nothing. Arguments as in `filtered`.
    """
    packed = _pack(observations, mask, process_var, measurement_var, init_mean, init_var)
    mean, var = _forward(packed)
    innovation_var = (var + packed.process_var + packed.measurement_var)[:, :-1]
    regular = (innovation_var > 0) & innovation_var.isfinite()
    scale = torch.where(regular, innovation_var, 1.0)
    error = torch.where(regular, packed.values - mean[:, :-1], 0.0)
    terms = torch.where(innovation_var > 0, math.log(2 * math.pi) + scale.log() + error**2 / scale, 0.0)
    seen = torch.arange(terms.shape[1], device=terms.device) < packed.count[:, None]
    return (-0.5 * torch.where(seen, terms, 0.0).sum(dim=1)).to(packed.dtype)


def filtered_mean(
    observations: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    process_var: float,
    measurement_var: float,
    init_mean: float = 0.0,
    init_var: float = 0.0,
    gain: str = "scheduled",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x_{i|i} alone, (batch, time): `filtered` for long sequences whose parameters are numbers.

    gain: `scheduled`, the exact K_1, K_2, ...; `steady`, their limit at every observation. out: where to write it, if
    there is no mask and no gradient; may be `observations`. Other arguments as in `filtered`. Allocates little besides
    the result, as long as the observations of every row are contiguous.
    """
    if gain not in ("scheduled", "steady"):
        raise ValueError(f"gain={gain!r} must be 'scheduled' or 'steady'")
    numbers = {
        "process_var": process_var,
        "measurement_var": measurement_var,
        "init_mean": init_mean,
        "init_var": init_var,
    }
    for name, value in numbers.items():
        if isinstance(value, torch.Tensor):
            raise ValueError(f"{name} is a tensor of shape {tuple(value.shape)}: filtered_mean takes numbers only")
        _check_parameter(name, value)
    dtype = _check_observations(observations)
    if process_var == measurement_var == 0:
        _pack(observations, mask, **numbers)  # for its check of certain states
    start = 0.0 if math.isinf(init_var) and gain == "scheduled" else init_mean
    time = observations.shape[1]
    plan = _number_plan(time, process_var, measurement_var, init_var, gain, observations.device)
    if mask is None:
        return recurrence.solve(plan, observations, start, dtype, out)
    if out is not None:
        raise ValueError("out is for observations without a mask")
    mask = _check_mask(mask, observations)
    if all_true(mask):
        return recurrence.solve(plan, observations, start, dtype)
    if observations.requires_grad and torch.is_grad_enabled():
        packed = _pack(observations, mask, **numbers)
        mean = recurrence.solve(recurrence.head(plan, packed.values.shape[1]), packed.values, start, dtype)
        return _take(packed, torch.cat([mean.new_full((len(mean), 1), init_mean), mean], dim=1), packed.rank)
    if _contiguous(mask):
        return _filter_spans(plan, observations, mask, start, init_mean, dtype)
    return _filter_holes(plan, observations, mask, start, init_mean, dtype)


def any_true(mask: torch.Tensor) -> bool:
    """mask.any() of a bool tensor, on a CPU many times faster."""
    return mask.numel() > 0 and bool(mask.view(torch.uint8).amax())


def any_in_rows(mask: torch.Tensor) -> torch.Tensor:
    """mask.any(dim=1) of a bool tensor, on a CPU many times faster."""
    return mask.view(torch.uint8).amax(dim=1).bool() if mask.numel() else mask.any(dim=1)


def all_true(mask: torch.Tensor) -> bool:
    """mask.all() of a bool tensor, on a CPU many times faster."""
    return mask.numel() == 0 or bool(mask.view(torch.uint8).amin())


def _contiguous(mask: torch.Tensor) -> bool:
    """Whether no row has a hole between two observations."""
    begins = mask[:, 1:] > mask[:, :-1]
    return not any_true(begins) or all_true(begins.sum(dim=1, dtype=torch.int32) + mask[:, 0] <= 1)


def _filter_spans(plan, observations, mask, start, init_mean, dtype) -> torch.Tensor:
    """The filtered mean where every row's observations are contiguous: rows that begin together are solved together."""
    time = observations.shape[1]
    count = mask.sum(dim=1, dtype=torch.int32)
    begin = torch.where(mask[:, 0], 0, time - count)
    inside = (count > 0) & ~mask[:, 0] & ~mask[:, -1]
    if inside.any():
        begin[inside] = mask[inside].view(torch.uint8).argmax(dim=1).to(begin.dtype)
    groups = begin.unique().tolist()
    if groups == [0]:
        result = recurrence.solve(plan, observations, start, dtype)
    else:
        result = torch.full(observations.shape, init_mean, dtype=dtype, device=observations.device)
        for first in groups:
            rows = (begin == first).nonzero()[:, 0]
            rows = slice(int(rows[0]), int(rows[0]) + 1) if len(rows) == 1 else rows
            result[rows, first:] = recurrence.solve(
                recurrence.head(plan, time - first), observations[rows, first:], start, dtype
            )
    end = (begin + count)[:, None]
    least = int(end.min())
    if least < time:
        tail = result[:, least:]
        last = result.gather(1, end.clamp(max=time) - 1)
        inside = mask[:, least:] if groups == [0] else torch.arange(least, time, device=end.device) < end
        torch.where(inside, tail, last, out=tail)
    return result


def _filter_holes(plan, observations, mask, start, init_mean, dtype) -> torch.Tensor:
    """The filtered mean under any mask: observations are moved together, filtered in place, and moved back.

    Indices are made block by block in the same two buffers: fresh memory costs more than the arithmetic.
    """
    batch, time = observations.shape
    height = min(batch, max(1, HOLES_BLOCK // time))
    rank, index = torch.empty(2, height, time, dtype=torch.int64, device=observations.device)
    blocks = [slice(top, min(top + height, batch)) for top in range(0, batch, height)]
    states = torch.zeros(batch, time + 1, dtype=dtype, device=observations.device)
    for part in blocks:
        here = slice(part.stop - part.start)
        torch.cumsum(mask[part], dim=1, out=rank[here])
        torch.mul(rank[here], mask[part], out=index[here])  # what is masked goes to column 0
        states[part].scatter_(1, index[here], observations[part].to(dtype))
    states[:, 0] = init_mean
    recurrence.solve(plan, states[:, 1:], start, dtype, out=states[:, 1:])
    result = torch.empty(batch, time, dtype=dtype, device=observations.device)
    for part in blocks:
        here = slice(part.stop - part.start)
        if len(blocks) > 1:
            torch.cumsum(mask[part], dim=1, out=rank[here])
        torch.gather(states[part], 1, rank[here], out=result[part])
    return result


def _pack(observations, mask, process_var, measurement_var, init_mean, init_var) -> _Packed:
    dtype = _check_observations(observations)
    batch, time = observations.shape
    device = observations.device
    named = {
        "process_var": process_var,
        "measurement_var": measurement_var,
        "init_mean": init_mean,
        "init_var": init_var,
    }
    columns = {name: _parameter(name, value, batch, device) for name, value in named.items()}
    if mask is not None:
        mask = _check_mask(mask, observations)
        mask = None if all_true(mask) else mask
    if mask is None:
        rank = torch.arange(1, time + 1, device=device)[None]
        count = torch.full((1,), time, device=device)
        values = observations
    else:
        rank = mask.cumsum(dim=1)
        count = rank[:, -1]
        # Column 0 collects what is masked, and is dropped.
        values = observations.new_zeros(batch, int(count.max()) + 1)
        values = values.scatter(1, rank * mask, observations)[:, 1:]
    packed = _Packed(values, rank, mask, count, dtype, (process_var, measurement_var, init_var), **columns)
    _check_certain(packed)
    return packed


def _parameter(name: str, value: Number, batch: int, device: torch.device) -> torch.Tensor:
    if isinstance(value, torch.Tensor) and value.ndim and value.shape != (batch,):
        raise ValueError(f"{name} has shape {tuple(value.shape)}: give a number or one value a row, ({batch},)")
    _check_parameter(name, value)
    return torch.as_tensor(value, dtype=torch.float64, device=device).detach().reshape(-1, 1)


def _check_parameter(name: str, value: Number) -> None:
    if name != "init_mean":
        local_level.check_variance(name, value, infinite=name == "init_var")
    elif not (value.isfinite().all() if isinstance(value, torch.Tensor) else math.isfinite(value)):
        raise ValueError(f"init_mean={value} must be finite")


def _check_observations(observations: torch.Tensor) -> torch.dtype:
    """The dtype of the result."""
    if not isinstance(observations, torch.Tensor) or observations.ndim != 2:
        shape = tuple(observations.shape) if isinstance(observations, torch.Tensor) else type(observations).__name__
        raise ValueError(f"observations must be a (batch, time) tensor, got {shape}")
    if observations.is_complex():
        raise ValueError(f"observations must be real, got {observations.dtype}")
    return torch.float64 if observations.dtype == torch.float64 else torch.float32


def _check_mask(mask: torch.Tensor, observations: torch.Tensor) -> torch.Tensor:
    if not isinstance(mask, torch.Tensor) or mask.shape != observations.shape:
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"mask has shape {shape}, observations {tuple(observations.shape)}")
    if mask.dtype == torch.bool:
        return mask
    wrong = (mask != 0) & (mask != 1)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(f"mask={mask[row, column].item()} in row {row}, column {column}: must be bool or 0/1")
    return mask != 0


def _check_certain(packed: _Packed) -> None:
    """Q = R = 0: after the prior (P0 = 0) or the first observation the state is known, and the rest must equal it."""
    certain = (packed.measurement_var == 0) & (packed.process_var == 0)
    if packed.values.numel() == 0 or not certain.any():
        return
    known = torch.where(packed.init_var > 0, packed.values[:, :1], packed.init_mean.to(packed.values.dtype))
    seen = torch.arange(packed.values.shape[1], device=known.device) < packed.count[:, None]
    wrong = seen & certain & (packed.values != known)
    if wrong.any():
        row, index = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"measurement_var=0 and process_var=0 make the state of row {row} certain, {known[row].item()}, but its "
            f"observation {index} is {packed.values[row, index].item()}: give a measurement_var > 0"
        )


def _model(packed: _Packed) -> tuple[recurrence.Plan, torch.Tensor]:
    """The recurrence x_i = (1 - K_i) x_{i-1} + K_i z_i of the rows, and P_{i|i} for i = 1..n, (batch or 1, n)."""
    n, device = packed.values.shape[1], packed.values.device
    if _alike(packed):
        numbers = [float(v) for v in packed.parameters]
        var = local_level.schedule(n, *numbers).filtered_var[None].to(device)
        return _number_plan(n, *numbers, "scheduled", device), var
    gain, keep, _ = local_level.window(0, n, packed.process_var, packed.measurement_var, packed.init_var)
    plan = recurrence.plan(n, lambda start, stop: (keep[:, start:stop], gain[:, start:stop]))
    return plan, packed.measurement_var * gain


@functools.lru_cache(maxsize=128)
def _number_plan(n, process_var, measurement_var, init_var, gain, device) -> recurrence.Plan:
    # One plan serves every length up to the next power of two: batches differ in width from step to step.
    size = max(recurrence.WINDOW, 1 << max(n - 1, 0).bit_length())
    return recurrence.head(_long_plan(size, process_var, measurement_var, init_var, gain, device), n)


@functools.lru_cache(maxsize=16)
def _long_plan(n, process_var, measurement_var, init_var, gain, device) -> recurrence.Plan:
    if gain == "steady":
        steady = local_level.steady_gain(process_var, measurement_var)
        keep = measurement_var / (measurement_var * (1 + steady) + process_var) if process_var else 1.0
        constant = torch.tensor([[keep], [steady]], dtype=torch.float64, device=device)
        return recurrence.plan(n, lambda start, stop: constant.expand(2, stop - start).split(1))
    variances = [
        torch.tensor([[v]], dtype=torch.float64, device=device) for v in (process_var, measurement_var, init_var)
    ]
    return recurrence.plan(n, lambda start, stop: local_level.window(start, stop, *variances)[1::-1])


def _alike(packed: _Packed) -> bool:
    """Whether one schedule of gains serves all rows."""
    return all(len(v) == 1 for v in (packed.process_var, packed.measurement_var, packed.init_var))


def _start(packed: _Packed) -> torch.Tensor:
    """x_0, (batch,): a diffuse prior's mean has no say."""
    start = torch.where(packed.init_var.isinf(), 0.0, packed.init_mean)
    return start.expand(packed.values.shape[0], 1)[:, 0]


def _forward(packed: _Packed) -> Belief:
    """x_{i|i}, (batch, n + 1), and P_{i|i}, (batch or 1, n + 1), for i = 0..n: float64, column 0 is the prior."""
    if packed.values.shape[1] <= SHORT and not _alike(packed):
        return _walk(packed)
    plan, var = _model(packed)
    mean = recurrence.solve(plan, packed.values, _start(packed), torch.float64)
    return Belief(
        torch.cat([packed.init_mean.expand(len(mean), 1), mean], dim=1),
        torch.cat([packed.init_var.expand(len(var), 1), var], dim=1),
    )


def _walk(packed: _Packed) -> Belief:
    """`_forward` step by step: for many short rows with parameters of their own, quicker than closed forms for each."""
    q, r = packed.process_var, packed.measurement_var
    x, p = _start(packed)[:, None], packed.init_var
    means, variances = [packed.init_mean.expand_as(x)], [p]
    for z in packed.values.to(x.dtype).split(1, dim=1):
        # (P + Q) / (P + Q + R), but 1 where that is inf / inf, and 0 where it is 0 / 0: what is certain stays.
        gain = (r / (p + q)).add_(1.0).reciprocal_().nan_to_num_(0.0)
        x, p = torch.lerp(x, z, gain), r * gain
        means.append(x)
        variances.append(p)
    return Belief(torch.cat(means, dim=1), torch.cat(torch.broadcast_tensors(*variances), dim=1))


def _diffuse(packed: _Packed, values: torch.Tensor) -> _Packed:
    parameters = (*packed.parameters[:2], math.inf)
    return packed._replace(values=values, parameters=parameters, init_var=packed.init_var.new_full((1, 1), math.inf))


def _smooth(packed: _Packed) -> Belief:
    """x_{i|n}, (batch, n + 1), and P_{i|n}, (batch or 1, n + 1), for i = 0..n: float64."""
    mean, var = _forward(packed)
    last = packed.count[:, None]
    # Backward from the row's last observation; behind it the last belief stands still.
    inner = torch.arange(mean.shape[1], device=mean.device) < last
    c = torch.where(inner, _share(var, packed.process_var), 1.0)
    rest = torch.where(inner, _share(packed.process_var, var), 0.0)
    gained = torch.where(inner, _parallel(var, packed.process_var), 0.0)
    last_mean = _take(packed, mean, last)[:, 0]
    last_var = var.expand(len(c), -1).gather(1, last.expand(len(c), 1))[:, 0]
    return Belief(_backward(c, rest, mean, last_mean), _backward(c * c, torch.ones_like(c), gained, last_var))


def _backward(decay, weight, values, last) -> torch.Tensor:
    decay, weight = decay.flip(1), weight.flip(1)
    plan = recurrence.plan(values.shape[1], lambda start, stop: (decay[:, start:stop], weight[:, start:stop]))
    return recurrence.solve(plan, values.flip(1), last, torch.float64).flip(1)


def _belief(packed: _Packed, mean: torch.Tensor, var: torch.Tensor, index: torch.Tensor) -> Belief:
    return Belief(_take(packed, mean, index).to(packed.dtype), _take(packed, var, index).to(packed.dtype))


def _take(packed: _Packed, table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """table (batch or 1, n + 1) at index (batch or 1, m): (batch, m)."""
    batch = packed.values.shape[0]
    return table.expand(batch, -1).gather(1, index.expand(batch, -1))


def _before(packed: _Packed) -> torch.Tensor:
    """(batch or 1, time): how many observations before this position."""
    return packed.rank - 1 if packed.mask is None else packed.rank - packed.mask.long()


def _share(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a / (a + b) for a, b in [0, inf]; 1/2 where they are equal, be it 0 or inf."""
    return torch.where(a == b, 0.5, 1 / (1 + b / a))


def _parallel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b / (a + b) for a, b in [0, inf]."""
    return 1 / (1 / a + 1 / b)
