"""What the filters cost, without a mask, with one that is all true, padded and with holes, and how exact they are.

Ours for long rows, the published approach, ours step by step, and as a floor torch.cumsum and a copy.
"""

import math
import statistics
from functools import partial

import torch

from verl_krpo.kalman import LocalLevel, filtered, filtered_mean
from verl_krpo.lab.bench.timing import median_ratio, paired, peak_bytes

SHAPES = ((8, 1024), (32, 4096), (64, 16384), (8, 131072))
MODEL = LocalLevel(process_var=1e-6, measurement_var=1.0)  # KPO's default


def published(z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The published filter (arXiv 2602.10609) from its description, P0 = 0: all of it in float32.

    With cosh eta = 1 + q/2, q = Q/R and U_t = sinh(t eta) / sinh(eta):

        K_t = q U_t / (U_t (q + 1) - U_{t-1}),    A_t = prod_{j <= t} (1 - K_j),    x_t = A_t sum_{s <= t} K_s z_s / A_s

    K_t is held within [1e-6, 1 - 1e-6]; A_t is exp of a sum of logarithms, held above 1e-30; a masked token observes 0.
    It also spreads P_t = R K_t over the rows.
    """
    q = torch.tensor(MODEL.process_var / MODEL.measurement_var, device=z.device)
    seen = mask.float()
    z = z.float() * seen
    eta = torch.log(1 + q / 2 + torch.sqrt(torch.clamp((1 + q / 2) ** 2 - 1, min=0)))
    u = torch.sinh(torch.arange(1, z.shape[1] + 1, device=z.device) * eta) / torch.sinh(eta)
    gain = q * u / (u * (q + 1) - torch.cat([u.new_zeros(1), u[:-1]]))
    gain = gain.clamp(1e-6, 1 - 1e-6)
    spread = (MODEL.measurement_var * gain).expand_as(z) * seen  # noqa: F841
    fall = (1 - gain).log().cumsum(0).clamp(min=math.log(1e-30)).exp()
    rise = gain * (1 / fall).clamp(max=math.exp(80))
    return fall * (z * rise).cumsum(1) * seen


def table(rounds: int, device: str) -> list[dict]:
    """One row a shape, method and mask."""
    return [row for shape in SHAPES for row in _rows(shape, rounds, device)]


def _rows(shape: tuple[int, int], rounds: int, device: str) -> list[dict]:
    batch, steps = shape
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=generator)
    lengths = steps // 2 + torch.randint(steps // 2, (batch, 1), generator=generator)
    masks = {
        "none": None,
        "all": torch.ones(shape, dtype=torch.bool),
        "right-padded": torch.arange(steps) < lengths,
        "holes": torch.rand(shape, generator=generator) > 0.2,
    }
    exact = {name: filtered(z.double(), mask, MODEL).mean for name, mask in masks.items()}
    z = z.to(device)
    masks = {name: None if mask is None else mask.to(device) for name, mask in masks.items()}
    calls = {("ours", name): partial(filtered_mean, z, mask, MODEL) for name, mask in masks.items()}
    calls |= {("published", name): partial(published, z, masks[name]) for name in ("all", "holes")}
    calls |= {("torch.cumsum", "none"): partial(torch.cumsum, z, 1), ("copy", "none"): z.clone}
    slow = {("step by step", "holes"): partial(filtered, z, masks["holes"], MODEL)}
    times = paired(calls, rounds, device) | paired(slow, 1, device)

    rows = []
    for (method, name), call in (calls | slow).items():
        row = {"shape": f"{batch} x {steps}", "method": method, "mask": name}
        row["microseconds"] = 1e6 * statistics.median(times[method, name])
        reference = times["published", "holes" if name == "holes" else "all"]
        row["speed / published"] = median_ratio(reference, times[method, name]) if (method, name) in calls else None
        row["max error / max state"] = row["peak extra memory / input"] = None
        if method in ("ours", "published", "step by step"):
            result = call().mean if method == "step by step" else call()
            error = (result.cpu().double() - exact[name]).abs().amax(dim=1) / exact[name].abs().amax(dim=1)
            row["max error / max state"] = error.max().item()
        if (method, name) in calls:
            row["peak extra memory / input"] = peak_bytes(call, device) / z.nbytes
        rows.append(row)
    return rows
