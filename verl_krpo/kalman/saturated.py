"""The filtered mean with saturated innovations, for observations with outliers (Cipra and Romera 1991).

    x_t = x_{t-1} + K_t clip(z_t - x_{t-1}, -kappa sigma_t, kappa sigma_t),    sigma_t^2 = P_{t|t-1} + R

Gains and variances are those of the model, whatever the data. Were it known which innovations saturate, the state would
obey a linear recurrence: x_t = x_{t-1} +- K_t kappa sigma_t where they do, the usual update where they do not. So the
pattern is guessed, the recurrence solved, the pattern read off its solution, until it is the one that was assumed. A
pattern that is right up to t gives a state that is right up to t, hence a pattern right up to t + 1: it ends, in
practice after a few rounds. Windows of time, each from the exact state, bound what an adversarial sequence can cost.
"""

import torch

from verl_krpo.kalman import scan
from verl_krpo.kalman.local_level import LocalLevel
from verl_krpo.kalman.sequence import pack, power_of_two, schedule, unpack

WINDOW = 1 << 14  # observations of all rows
PATIENCE = 3  # rounds before asking whether what still changes is rounding only
ROUNDING = 4 * torch.finfo(torch.float64).eps


def filtered_mean(
    observations: torch.Tensor,
    mask: torch.Tensor | None,
    model: LocalLevel,
    innovation_clip: float,
    gain: str = "scheduled",
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_{t|t}, (rows, time), and where the innovation saturated, (rows, time) bool.

    innovation_clip: kappa > 0, in standard deviations of the innovation. The rest as in `sequence.filtered_mean`. No
    gradient flows. ValueError names a wrong argument.
    """
    if not innovation_clip > 0:
        raise ValueError(f"innovation_clip={innovation_clip} must be > 0")
    packed, rank = pack(observations.detach(), mask)
    gains = schedule(model, gain, power_of_two(packed.shape[1]))[: packed.shape[1]].to(packed.device)
    process_var, measurement_var, init_mean, init_var = model.numbers()
    before = measurement_var * gains.roll(1)  # P_{t-1|t-1} = R K_{t-1}
    if gain == "scheduled":
        before[:1] = init_var
    bounds = innovation_clip * (before + process_var + measurement_var).sqrt()

    state = torch.full((len(packed),), init_mean, dtype=torch.float64, device=packed.device)
    means, sides = [packed[:, :0].double()], [packed[:, :0].bool()]
    width = max(1, WINDOW // max(1, len(packed)))
    for start in range(0, packed.shape[1], width):
        part = slice(start, start + width)
        x, side = _window(packed[:, part].double(), gains[part], bounds[part], state)
        state = x[:, -1]
        means.append(x)
        sides.append(side != 0)
    saturated = unpack(torch.cat(sides, dim=1), rank, False)
    saturated = saturated if mask is None else saturated & mask.bool()
    mean = unpack(torch.cat(means, dim=1), rank, init_mean)
    return mean.to(torch.promote_types(observations.dtype, torch.float32)), saturated


def _window(
    z: torch.Tensor, k: torch.Tensor, bound: torch.Tensor, start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states of one window (rows, time) and the side (-1, 0, 1) on which each innovation saturates."""
    side = torch.zeros_like(z)
    x = _linear((1 - k).expand_as(z), k * z, start)
    turn = 0
    while True:
        innovation = z - torch.cat([start[:, None], x[:, :-1]], dim=1)
        new = (innovation > bound).double() - (innovation < -bound).double()
        if torch.equal(new, side):
            return x, side
        before, side = x, new
        x = _linear(torch.where(side == 0, 1 - k, 1.0), torch.where(side == 0, k * z, side * k * bound), start)
        turn += 1
        # An innovation that lies on its bound may change sides forever, by rounding and without effect.
        if turn > PATIENCE and ((x - before).abs() <= ROUNDING * (x.abs() + before.abs())).all():
            return x, side


def _linear(decay: torch.Tensor, drive: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """x_t = decay_t x_{t-1} + drive_t."""
    return scan.solve(scan.windows(decay, torch.ones_like(decay)), drive, start)
