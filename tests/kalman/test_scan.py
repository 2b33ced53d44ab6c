"""The windowed cumulative sum against the recurrence itself, one step after the other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_krpo.kalman import scan


def one_after_the_other(decay, weight, values, initial):
    state, out = initial, []
    for t in range(values.shape[1]):
        state = decay[:, t] * state + weight[:, t] * values[:, t]
        out.append(state)
    return torch.stack(out, dim=1)


def worst_error(result, expected):
    return ((result - expected).abs().amax(dim=1) / expected.abs().amax(dim=1).clamp(min=1e-300)).max().item()


@pytest.mark.parametrize("n", [1, 2, 3, 151, scan.WINDOW - 1, scan.WINDOW + 1])
@pytest.mark.parametrize("decay", [1.0, 0.999, 0.3, 1e-3, 1e-20, 0.0])
def test_constant_coefficients(n, decay):
    torch.manual_seed(n)
    values, initial = torch.randn(3, n, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    decays, weights = torch.full((1, n), decay, dtype=torch.float64), torch.full((1, n), 0.7, dtype=torch.float64)
    result = scan.solve(scan.windows(decays, weights), values, initial)
    assert worst_error(result, one_after_the_other(decays, weights, values, initial)) <= 1e-12


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 20),
    n=st.sampled_from([1, 2, 5, 17, 64, 130, 400]),
    decades=st.sampled_from([0.0, 1e-6, 0.01, 1.0, 20.0, 400.0]),
    shared=st.booleans(),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_varying_coefficients(seed, rows, n, decades, shared, scale):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    height = 1 if shared else rows
    decay, weight = 10 ** (-decades * draw(height, n)), draw(height, n)
    decay = torch.where(draw(height, n) < 0.05, 0.0, decay)
    values, initial = (draw(rows, n) - 0.5) * scale, (draw(rows) - 0.5) * scale
    result = scan.solve(scan.windows(decay, weight), values, initial)
    assert worst_error(result, one_after_the_other(decay, weight, values, initial)) <= 1e-12


@pytest.mark.parametrize("decades", [0.01, 20.0, 400.0])
@pytest.mark.parametrize("height", [1, 3])
def test_gradients_across_windows(decades, height):
    torch.manual_seed(0)
    decay, weight = 10 ** (-decades * torch.rand(height, 29).double()), torch.rand(height, 29).double()
    decay[:, 7] = 0.0
    windows = scan.windows(decay, weight)
    values = torch.randn(3, 29, dtype=torch.float64, requires_grad=True)
    initial = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, i: scan.solve(windows, v, i), (values, initial))


def test_windows_that_cover_more_than_is_asked_for():
    decay = torch.full((1, 3 * scan.WINDOW), 0.99, dtype=torch.float64)
    values, initial = torch.randn(2, scan.WINDOW + 5, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    result = scan.solve(scan.windows(decay, decay), values, initial)
    assert worst_error(result, one_after_the_other(decay, decay, values, initial)) <= 1e-12


def test_a_bad_value_spoils_the_rest_of_its_row_only():
    values, initial = torch.randn(5, 10_000), torch.zeros(5, dtype=torch.float64)
    decay = torch.full((1, 10_000), 0.99, dtype=torch.float64)
    windows = scan.windows(decay, decay)
    clean = scan.solve(windows, values, initial)
    values[2, 777] = torch.nan
    result = scan.solve(windows, values, initial)
    assert torch.equal(result[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
    assert torch.equal(result[2, :777], clean[2, :777]) and result[2, 777:].isnan().all()


def test_nothing_to_do():
    decay = torch.ones(1, 5, dtype=torch.float64)
    assert scan.solve(scan.windows(decay, decay), torch.zeros(0, 5), torch.zeros(0)).shape == (0, 5)
    assert scan.solve(scan.windows(decay[:, :0], decay[:, :0]), torch.zeros(3, 0), torch.zeros(3)).shape == (3, 0)
