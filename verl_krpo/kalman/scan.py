"""The linear recurrence under the filters of long rows, x_t = a_t x_{t-1} + k_t z_t with 0 <= a_t <= 1.

Within a window, D_t = a_1 ... a_t turns it into a cumulative sum,

    x_t = D_t (x_0 + sum_{s <= t} (k_s / D_s) z_s),

in float64. D_t would underflow in the end, so a window stops before it has fallen below 1e-150, and the next one starts
from its last state.
"""

import torch

WINDOW = 6144  # steps: 8 rows of float64 stay in a core's cache
SMALLEST = 1e-150
FLOOR = 1e-50  # a decay below this is 0 as far as float64 can tell; a window has then at least two steps


Window = tuple[torch.Tensor, torch.Tensor]  # k_s / D_s and D_t of consecutive steps, (rows or 1, steps) float64


def windows(decay: torch.Tensor, weight: torch.Tensor) -> list[Window]:
    """The windows of coefficients a (`decay`) and k (`weight`), (rows or 1, n) float64."""
    result, start = [], 0
    while len(decay) and start < decay.shape[1]:
        product = decay[:, start : start + WINDOW].clamp(min=FLOOR).cumprod(dim=1)
        steps = int((product.amin(dim=0) > SMALLEST).sum())
        product = product[:, :steps]
        result.append((weight[:, start : start + steps] / product, product))
        start += steps
    return result


def solve(windows: list[Window], values: torch.Tensor, initial: torch.Tensor, dtype=torch.float64) -> torch.Tensor:
    """x_1 .. x_n (rows, n) from z (`values`, (rows, n)) and x_0 (`initial`, (rows,)), float64 inside, `dtype` out.

    The windows may cover more than n steps. Differentiable in values and initial.
    """
    result, state, start = values.new_empty(values.shape, dtype=dtype), initial, 0
    for scaled_weight, decay_product in windows:
        # In place, one copy of the window: allocating at every step costs twice the arithmetic.
        x = values[:, start : start + decay_product.shape[1]].to(torch.float64, copy=True)
        if not (n := x.shape[1]):
            break
        x.mul_(scaled_weight[:, :n]).cumsum_(dim=1).add_(state[:, None]).mul_(decay_product[:, :n])
        state, result[:, start : start + n] = x[:, -1], x
        start += n
    return result
