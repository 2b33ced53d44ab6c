"""The local-level filter with saturated innovations, for observations with outliers (Cipra and Romera 1991).

    x_t = x_{t-1} + K_t clip(z_t - x_{t-1}, -kappa sigma_t, kappa sigma_t),    sigma_t^2 = P_{t|t-1} + R

Gains and variances are those of the model, whatever the data. Were it known which innovations saturate, the state would
obey a linear recurrence: x_t = x_{t-1} +- K_t kappa sigma_t where they do, the usual update where they do not. So the
pattern is guessed, the recurrence solved, the pattern read off its solution, and so on until the pattern is the one
that was assumed: then the solution is the sequential one. A pattern that is right up to t gives a state that is right
up to t, hence a pattern right up to t + 1: as many rounds as there are tokens suffice, and a few do in practice. Time
is cut into windows, each starting from the exact state, which bounds what an adversarial sequence can cost.
"""

import itertools

import torch

from verl_krpo.kalman import local_level
from verl_krpo.kalman.recurrence import plan, solve

WINDOW = 1 << 14  # tokens of all rows
PATIENCE = 3  # rounds before it is asked whether what still changes is rounding only
ROUNDING = 4 * torch.finfo(torch.float64).eps


def filtered_mean(
    observations: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    process_var: float,
    measurement_var: float,
    innovation_clip: float,
    init_mean: float = 0.0,
    init_var: float = 0.0,
    gain: str = "scheduled",
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_{t|t}, (batch, time), and where the innovation saturated, (batch, time) bool.

    innovation_clip: kappa > 0 in standard deviations of the innovation; measurement_var: R > 0. The other arguments and
    the meaning of the mask as in `filter.filtered_mean`. No gradient flows. ValueError names a bad argument.
    """
    if not innovation_clip > 0:
        raise ValueError(f"innovation_clip={innovation_clip} must be > 0")
    if not measurement_var > 0:
        raise ValueError(f"measurement_var={measurement_var} must be > 0 where innovations are clipped")
    if gain not in ("scheduled", "steady"):
        raise ValueError(f"gain={gain!r} must be 'scheduled' or 'steady'")
    rows, time = observations.shape
    device = observations.device
    dtype = torch.float64 if observations.dtype == torch.float64 else torch.float32
    gains, variances = _model(time, process_var, measurement_var, init_var, gain)
    # One more entry in front: what the gain index finds before the first observation.
    gains = torch.cat([gains.new_zeros(1), gains]).to(device)
    variances = torch.cat([variances.new_full((1,), measurement_var), variances]).to(device)
    keeps, bounds = measurement_var / variances, innovation_clip * variances.sqrt()  # 1 - K without cancellation

    mean = torch.empty(rows, time, dtype=dtype, device=device)
    saturated = torch.empty(rows, time, dtype=torch.bool, device=device)
    state = torch.full((rows,), init_mean, dtype=torch.float64, device=device)
    index = torch.zeros(rows, 1, dtype=torch.long, device=device)
    window = max(1, WINDOW // max(1, rows))
    for start in range(0, time, window):
        at = (slice(None), slice(start, start + window))
        z = observations.detach()[at]
        if mask is None:
            index = torch.arange(start + 1, start + 1 + z.shape[1], device=device)[None]
            k, keep = gains[index], keeps[index]
        else:
            seen = mask[at].bool()
            index = index[:, -1:] + seen.cumsum(dim=1)
            k, keep = torch.where(seen, gains[index], 0.0), torch.where(seen, keeps[index], 1.0)
            z = torch.where(seen, z, 0.0)
        x, side = _window(z.to(torch.float64), k, keep, bounds[index], state)
        state = x[:, -1]
        mean[at], saturated[at] = x.to(dtype), side != 0 if mask is None else seen & (side != 0)
    return mean, saturated


def _model(n, process_var, measurement_var, init_var, gain):
    """K_t and the innovation's variance P_{t|t-1} + R for t = 1..n, float64."""
    if gain == "scheduled":
        schedule = local_level.schedule(n, process_var, measurement_var, init_var)
        return schedule.gain, schedule.predicted_var + measurement_var
    steady = torch.full((n,), local_level.steady_gain(process_var, measurement_var), dtype=torch.float64)
    return steady, measurement_var * steady + process_var + measurement_var


def _window(z, k, keep, bound, start):
    """The states of one window and the side (-1, 0, 1) on which each innovation saturates; float64 (rows, time)."""
    x, side = _linear(keep, k * z, start), torch.zeros_like(z, dtype=torch.int8)
    for turn in itertools.count():
        innovation = z - torch.cat([start[:, None], x[:, :-1]], dim=1)
        new = (innovation > bound).to(torch.int8) - (innovation < -bound).to(torch.int8)
        if torch.equal(new, side):
            return x, side
        free = new == 0
        before, side = x, new
        x = _linear(torch.where(free, keep, 1.0), torch.where(free, k * z, new * (k * bound)), start)
        # An innovation that lies on its bound may change sides for ever, by rounding and without effect.
        if turn >= PATIENCE and ((x - before).abs() <= ROUNDING * (x.abs() + before.abs())).all():
            return x, side


def _linear(decay, drive, start):
    """x_t = decay_t x_{t-1} + drive_t."""
    weight = torch.ones_like(decay)
    segments = plan(decay.shape[1], lambda left, right: (decay[:, left:right], weight[:, left:right]))
    return solve(segments, drive, start, torch.float64)
