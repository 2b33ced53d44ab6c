"""The linear recurrence under every filter here: x_t = a_t x_{t-1} + k_t z_t, with 0 <= a_t <= 1.

Within a chunk of time, D_t = a_1 ... a_t turns it into a cumulative sum,

    x_t = D_t (x_0 + sum_{s <= t} (k_s / D_s) z_s),

in float64. D_t would underflow in the end, so a chunk ends before it has fallen by 10^-150; the states with which the
chunks begin obey a recurrence of the same kind. Data pass through one small buffer, block by block: besides the result
nothing of its size is allocated.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

WINDOW = 6144  # longest segment, in time steps
DECADES = 150.0  # D_t falls by at most this many powers of ten in a chunk
FLOOR = 1e-50  # a_t below this is 0 as far as float64 can tell; no chunk is then shorter than three steps
CPU_BLOCK = 3 << 14  # elements of the buffer: 384 KiB stay in a core's cache
DEVICE_BLOCK = 1 << 24


class Segment(NamedTuple):
    """A stretch of time: rise k_s / D_s and fall D_t, float64, (rows or 1, steps), or (rows or 1, chunks, length).

    hand, (rows or 1,) or (rows or 1, chunks): what a chunk's last sum is multiplied with to give the next one's start.
    between: the plan of the recurrence of those starts, where there are several chunks.
    """

    rise: torch.Tensor
    fall: torch.Tensor
    hand: torch.Tensor
    between: "list[Segment] | None"

    @property
    def steps(self) -> int:
        return math.prod(self.fall.shape[1:])


Plan = list[Segment]


def plan(n: int, coefficients: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]) -> Plan:
    """The segments of n steps; coefficients(start, stop) gives a and k of those steps, (rows or 1, stop - start)."""
    segments, start, stop, same = [], 0, 0, ()
    while start < n:
        decay, weight = coefficients(start, min(start + WINDOW, n))
        if len(decay) == 0:  # no rows: nothing to solve
            break
        if segments and all(torch.equal(new[:, :stop], old) for new, old in zip((decay, weight), same, strict=True)):
            segments.append(segments[-1])  # constant coefficients are stored once
            start += stop
            continue
        decay, width = decay.clamp(min=FLOOR), decay.shape[1]
        fits = width
        if -width * math.log10(decay.amin()) > DECADES:  # else the steepest decay fits all along
            decades = -decay.amin(dim=0).log10()
            fits = int((decades.cumsum(dim=0) <= DECADES).sum())
        if fits == width or fits >= WINDOW // 8:
            chunks, length = 1, fits
        else:
            length = int(DECADES / decades.max())
            chunks = width // length
        stop = chunks * length
        same = decay[:, :stop], weight[:, :stop]
        shape = (len(decay), length) if chunks == 1 else (len(decay), chunks, length)
        fall = decay[:, :stop].reshape(shape).cumprod(dim=-1)
        rise = weight[:, :stop].reshape(shape) / fall
        hand = fall[..., -1]
        segments.append(Segment(rise, fall, hand, _between(hand) if chunks > 1 else None))
        start += stop
    return segments


def head(segments: Plan, n: int) -> Plan:
    """The plan of the first n of its steps."""
    cut = []
    for segment in segments:
        if n <= 0:
            break
        if segment.steps <= n:
            cut.append(segment)
        elif segment.between is None:
            cut.append(_single(segment.rise[:, :n], segment.fall[:, :n]))
        else:
            rise, fall, hand, between = segment
            whole, rest = divmod(n, fall.shape[2])
            if whole > 1:
                cut.append(Segment(rise[:, :whole], fall[:, :whole], hand[:, :whole], head(between, whole)))
            elif whole:
                cut.append(_single(rise[:, 0], fall[:, 0]))
            if rest:
                cut.append(_single(rise[:, whole, :rest], fall[:, whole, :rest]))
        n -= segment.steps
    return cut


def _single(rise: torch.Tensor, fall: torch.Tensor) -> Segment:
    return Segment(rise, fall, fall[:, -1], None)


def solve(
    segments: Plan,
    values: torch.Tensor,
    initial: torch.Tensor | float = 0.0,
    dtype: torch.dtype = torch.float64,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x_1..x_n, (rows, n) of `dtype`, from z (`values`, (rows, n), any dtype) and x_0 (`initial`, a number or (rows,)).

    Differentiable in both, unless written to `out`, which may be `values`. A NaN or Inf spoils the rest of its own row.
    """
    if out is None and torch.is_grad_enabled() and (values.requires_grad or getattr(initial, "requires_grad", False)):
        initial = torch.as_tensor(initial, dtype=torch.float64, device=values.device).expand(len(values))
        return _Solve.apply(values, initial, segments, dtype)
    if len(segments) == 1 and segments[0].between is None and values.numel() <= CPU_BLOCK:
        # What _run does, without its bookkeeping: that would cost as much as the sums themselves.
        rise, fall, _, _ = segments[0]
        sums = values.to(torch.float64, copy=True).mul_(rise)
        if isinstance(initial, torch.Tensor) or initial != 0:
            sums[:, 0] += initial
        sums.cumsum_(1).mul_(fall)
        return sums.to(dtype) if out is None else out.copy_(sums)
    result = torch.empty(values.shape, dtype=dtype, device=values.device) if out is None else out
    _run(segments, values, initial, result)
    return result


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, initial, segments, dtype):
        ctx.segments, ctx.dtypes = segments, (values.dtype, initial.dtype)
        result = torch.empty(values.shape, dtype=dtype, device=values.device)
        _run(segments, values, initial, result)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        # The adjoint is the same recurrence in reversed time, with rise and fall exchanged.
        values = torch.empty(grad.shape, dtype=ctx.dtypes[0], device=grad.device)
        initial = _run(_adjoint(ctx.segments), grad.flip(1), 0.0, values)
        return values.flip(1), initial.to(ctx.dtypes[1]), None, None


def _run(segments: Plan, values: torch.Tensor, initial: torch.Tensor | float, result: torch.Tensor) -> torch.Tensor:
    """Writes x to `result`; returns (rows,) what the last chunk would hand on."""
    rows, n = values.shape
    block = CPU_BLOCK if values.device.type == "cpu" else DEVICE_BLOCK
    last = torch.empty(rows, dtype=torch.float64, device=values.device).copy_(torch.as_tensor(initial))
    if values.numel() == 0:
        return last
    steps = [segment.steps for segment in segments]
    width = max(steps)
    height = min(rows, max(1, block // width))
    buffer = torch.empty(height, width, dtype=torch.float64, device=values.device)
    for top in range(0, rows, height):
        part = slice(top, min(top + height, rows))
        state, wide = last[part], buffer[: part.stop - top]
        pieces = (x[part].split_with_sizes(steps, dim=1) for x in (values, result))
        for (rise, fall, hand, between), z, x in zip(segments, *pieces, strict=True):
            if len(fall) > 1:
                rise, fall, hand = rise[part], fall[part], hand[part]
                between = between and _rows(between, part)
            sums = wide if z.shape[1] == width else wide[:, : z.shape[1]]
            sums.copy_(z)
            if between is None:
                sums.mul_(rise)
                sums.select(1, 0).add_(state)
                torch.cumsum(sums, dim=1, out=sums)
                torch.mul(hand, sums.select(1, -1), out=state)
                sums.mul_(fall)
            else:
                chunked = sums.view(len(z), *fall.shape[1:])
                chunked.mul_(rise)
                torch.cumsum(chunked, dim=2, out=chunked)
                starts = torch.empty(chunked.shape[:2], dtype=torch.float64, device=values.device)
                _run(between, chunked[..., -1], state, starts)
                chunked[:, 0].add_(state[:, None])
                chunked[:, 1:].add_(starts[:, :-1, None])
                state.copy_(starts[:, -1])
                chunked.mul_(fall)
            x.copy_(sums)
    return last


def _rows(segments: Plan, part: slice) -> Plan:
    return [Segment(s.rise[part], s.fall[part], s.hand[part], s.between and _rows(s.between, part)) for s in segments]


def _between(hand: torch.Tensor) -> Plan:
    """start_{c+1} = hand_c (start_c + sum_c): the recurrence again, with a = k = hand."""
    return plan(hand.shape[1], lambda start, stop: (hand[:, start:stop], hand[:, start:stop]))


def _adjoint(segments: Plan) -> Plan:
    """The recurrence of the gradients k_t l_t, l_t = g_t + a_{t+1} l_{t+1}: time reversed, rise and fall exchanged."""
    adjoint = []
    for rise, fall, hand, between in reversed(segments):
        dims, end = tuple(range(1, fall.ndim)), fall[..., -1:]
        back = hand if between is None else hand.flip(1)
        next_starts = None if between is None else _between(back)
        adjoint.append(Segment((fall / end).flip(dims), (rise * end).flip(dims), back, next_starts))
    return adjoint
