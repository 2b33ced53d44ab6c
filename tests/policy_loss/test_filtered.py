"""The filtered log-ratios as the loss takes them: any length, mask, dtype, Q/R, within 5e-7 of a row's largest."""

import numpy as np
import pytest
import torch

from verl_krpo.config import KpoConfig
from verl_krpo.kalman.moments import Noise
from verl_krpo.policy_loss import kpo as loss

MASKS = ["full", "right padding", "left padding", "holes"]


def sequential(z, mask, q_var, r_var):
    """All rows together, token by token in float64, the variance by its own recursion."""
    x, var = np.zeros(len(z)), np.zeros(len(z))
    out = np.zeros(z.shape)
    for t in range(z.shape[1]):
        predicted = var + q_var
        gain = np.where(mask[:, t], predicted / (predicted + r_var), 0.0)
        x = x + gain * (np.where(mask[:, t], z[:, t], 0.0) - x)
        var = np.where(mask[:, t], (1 - gain) * predicted, var)
        out[:, t] = x
    return out


def masked(kind, rows, width, make):
    at = torch.arange(width)
    length = torch.randint(width // 3, width + 1, (rows, 1), generator=make)
    return {
        "full": torch.ones(rows, width, dtype=torch.bool),
        "right padding": at < length,
        "left padding": at >= width - length,
        "holes": (at < length) & (torch.rand(rows, width, generator=make) > 0.2),
    }[kind]


def worst(q_var, width, kind, dtype, rows=2):
    make = torch.Generator().manual_seed(width)
    old = -torch.rand(rows, width, generator=make)
    new = old + 0.1 * torch.randn(rows, width, generator=make)
    mask = masked(kind, rows, width, make)
    poison = torch.tensor([float("nan"), float("inf"), float("-inf")])[torch.arange(width) % 3].expand(rows, width)
    new, old = torch.where(mask, new, poison).to(dtype), torch.where(mask, old, poison.flip(1)).to(dtype)
    expected = sequential(torch.where(mask, new.double() - old.double(), 0.0).numpy(), mask.numpy(), q_var, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x, _ = loss._filtered((new, old), mask, loss._Rule(KpoConfig(), Noise(q_var, 1.0), 1.0, 0.2, 0.2))
    assert x.dtype == torch.float32
    error = np.where(mask, np.abs(x.double().numpy() - expected), 0.0).max(axis=1)
    return (error / np.where(mask, np.abs(expected), 0.0).max(axis=1).clip(min=1e-300)).max()


@pytest.mark.parametrize("q_var", [0.0, 1e-9, 1e-8, 1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("kind, dtype", [*((kind, torch.float32) for kind in MASKS), ("holes", torch.bfloat16)])
def test_nine_thousand_tokens(q_var, kind, dtype):
    assert worst(q_var, 9001, kind, dtype) < 5e-7


@pytest.mark.parametrize("q_var", [1e-9, 1e-6, 1.0])
@pytest.mark.parametrize("kind", ["right padding", "holes"])
def test_a_very_long_response(q_var, kind):
    assert worst(q_var, 131072, kind, torch.float32) < 5e-7
