"""The local-level model (random walk plus noise), and what its filter knows before it has seen any data.

    state        x_i = x_{i-1} + w_i,   w_i ~ N(0, Q)
    observation  z_i = x_i + v_i,       v_i ~ N(0, R)
    prior        x_0 ~ N(m0, P0)

Gains and variances depend on Q, R, P0 and the number of observations only (the Riccati recursion):

    P_{i|i-1} = P_{i-1|i-1} + Q        K_i = P_{i|i-1} / (P_{i|i-1} + R)        P_{i|i} = (1 - K_i) P_{i|i-1} = R K_i
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

Number = float | torch.Tensor


class Belief(NamedTuple):
    """Gaussian beliefs about the state: mean and var of one shape."""

    mean: torch.Tensor
    var: torch.Tensor


@dataclass(frozen=True)
class LocalLevel:
    """The model's parameters: numbers, or (rows,) tensors with one value a row. ValueError names a wrong one.

    Attributes:
        process_var: Q >= 0, in squared units of the observations
        measurement_var: R > 0, in squared units of the observations
        init_mean: m0
        init_var: P0 >= 0; inf is the exact diffuse limit
    """

    process_var: Number
    measurement_var: Number
    init_mean: Number = 0.0
    init_var: Number = 0.0

    def __post_init__(self) -> None:
        _require("process_var", self.process_var, lambda v: (v >= 0) & v.isfinite(), "finite and >= 0")
        _require("measurement_var", self.measurement_var, lambda v: (v > 0) & v.isfinite(), "finite and > 0")
        _require("init_mean", self.init_mean, torch.isfinite, "finite")
        _require("init_var", self.init_var, lambda v: v >= 0, ">= 0 (inf: diffuse)")

    def columns(self, rows: int, device: torch.device) -> list[torch.Tensor]:
        """Q, R, m0 and P0 as (rows,) float64 tensors. ValueError where a tensor has another number of rows."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != (rows,):
                raise ValueError(f"{name} has shape {tuple(value.shape)}: give a number or one value a row, ({rows},)")
        values = vars(self).values()
        return [torch.as_tensor(v, dtype=torch.float64, device=device).expand(rows) for v in values]

    def numbers(self) -> tuple[float, ...]:
        """Q, R, m0 and P0 as numbers. ValueError for a tensor."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                raise ValueError(f"{name} is a tensor of shape {tuple(value.shape)}: long rows share one number")
        return tuple(map(float, vars(self).values()))


def _require(name: str, value: Number, holds, rule: str) -> None:
    values = torch.as_tensor(value, dtype=torch.float64)
    wrong = ~holds(values)
    if wrong.any():
        row = int(wrong.reshape(-1).nonzero()[0])
        where = f" in row {row}" if values.ndim else ""
        raise ValueError(f"{name}={values.reshape(-1)[row].item()}{where} must be {rule}")


@functools.lru_cache(maxsize=16)
def gains(model: LocalLevel, n: int) -> torch.Tensor:
    """K_1 .. K_n by the Riccati recursion, (n,) float64; cached, so not to be written to."""
    process_var, measurement_var, _, var = model.numbers()
    values = []
    for _ in range(n):
        var += process_var
        gain = 1 / (1 + measurement_var / var) if var else 0.0  # also for var = inf
        var = measurement_var * gain
        values.append(gain)
    return torch.tensor(values, dtype=torch.float64)


def steady_gain(model: LocalLevel) -> float:
    """The gain's limit: the root in [0, 1) of K^2 + q K - q = 0, q = Q/R, which is 2 / (1 + sqrt(1 + 4/q))."""
    process_var, measurement_var, *_ = model.numbers()
    return 2 / (1 + math.sqrt(1 + 4 * measurement_var / process_var)) if process_var else 0.0
