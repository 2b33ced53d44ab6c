import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_krpo.kalman import recurrence

WINDOW = recurrence.WINDOW
LENGTHS = [1, 2, 3, 7, 149, 150, 151, 1023, 1025, WINDOW - 1, WINDOW, WINDOW + 1]


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def one_after_the_other(decay, weight, values, initial):
    state, out = initial, []
    for t in range(values.shape[1]):
        state = decay[:, t] * state + weight[:, t] * values[:, t]
        out.append(state)
    return torch.stack(out, dim=1)


def plan_of(decay, weight):
    return recurrence.plan(decay.shape[1], lambda start, stop: (decay[:, start:stop], weight[:, start:stop]))


def worst_error(result, expected):
    return ((result - expected).abs().amax(dim=1) / expected.abs().amax(dim=1).clamp(min=1e-300)).max().item()


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("decay", [1.0, 0.999, 0.3, 1e-3, 1e-20, 0.0])
def test_constant_coefficients(n, decay):
    rows = 1 if n % 2 else 11
    torch.manual_seed(n)
    values, initial = torch.randn(rows, n, dtype=torch.float64), torch.randn(rows, dtype=torch.float64)
    decays, weights = torch.full((1, n), decay, dtype=torch.float64), torch.full((1, n), 0.7, dtype=torch.float64)
    result = recurrence.solve(plan_of(decays, weights), values, initial)
    assert worst_error(result, one_after_the_other(decays, weights, values, initial)) <= 1e-12


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 40),
    n=st.sampled_from([1, 2, 5, 17, 64, 130, 600]),
    decades=st.sampled_from([0.0, 1e-6, 0.01, 1.0, 20.0, 400.0]),
    shared=st.booleans(),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_varying_coefficients(seed, rows, n, decades, shared, scale):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    height = 1 if shared else rows
    decay, weight = 10 ** (-decades * draw(height, n)), draw(height, n)
    decay = torch.where(draw(height, n) < 0.05, 0.0, decay)
    values, initial = (draw(rows, n) - 0.5) * scale, (draw(rows) - 0.5) * scale
    result = recurrence.solve(plan_of(decay, weight), values, initial)
    assert worst_error(result, one_after_the_other(decay, weight, values, initial)) <= 1e-12


@pytest.mark.parametrize("decay", [0.9999, 0.5, 1e-3])
def test_head_is_the_shorter_plan(decay):
    n = 2 * WINDOW
    decays, weights = torch.full((1, n), decay, dtype=torch.float64), torch.full((1, n), 0.5, dtype=torch.float64)
    values = torch.randn(3, n, dtype=torch.float64)
    whole = recurrence.solve(plan_of(decays, weights), values, 1.0)
    for m in (0, 1, 149, 150, 151, 1000, WINDOW, WINDOW + 1, n):
        part = recurrence.head(plan_of(decays, weights), m)
        assert sum(segment.steps for segment in part) == m
        torch.testing.assert_close(recurrence.solve(part, values[:, :m], 1.0), whole[:, :m], rtol=1e-13, atol=1e-15)


def test_constant_segments_are_stored_once():
    n = 20 * WINDOW
    constant = torch.full((1, n), 0.999, dtype=torch.float64)
    segments = plan_of(constant, constant)
    assert len({id(segment) for segment in segments[:-1]}) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool])
def test_any_dtype_in(dtype):
    values = (torch.randn(4, 300) * 3).to(dtype)
    decay = torch.full((1, 300), 0.99, dtype=torch.float64)
    expected = one_after_the_other(decay, decay, values.double(), torch.zeros(4, dtype=torch.float64))
    assert torch.equal(recurrence.solve(plan_of(decay, decay), values, 0.0, torch.float32), expected.float())


def test_a_bad_value_spoils_the_rest_of_its_row_only():
    values = torch.randn(5, 40_000)
    decay = torch.full((1, 40_000), 0.99, dtype=torch.float64)
    clean = recurrence.solve(plan_of(decay, decay), values)
    values[2, 777] = torch.nan
    result = recurrence.solve(plan_of(decay, decay), values)
    assert torch.equal(result[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
    assert torch.equal(result[2, :777], clean[2, :777]) and result[2, 777:].isnan().all()


@pytest.mark.parametrize("decades", [0.01, 20.0, 400.0])
@pytest.mark.parametrize("height", [1, 3])
def test_gradients_of_values_and_initial(decades, height):
    torch.manual_seed(0)
    decay, weight = 10 ** (-decades * torch.rand(height, 29).double()), torch.rand(height, 29).double()
    segments = plan_of(decay, weight)
    values = torch.randn(3, 29, dtype=torch.float64, requires_grad=True)
    initial = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, i: recurrence.solve(segments, v, i), (values, initial))


@pytest.mark.parametrize("n", [WINDOW + 3])
@pytest.mark.parametrize("decay", [0.9999, 0.5, 1e-3])
def test_gradients_across_segments(n, decay):
    decays = torch.full((1, n), decay, dtype=torch.float64)
    values = torch.randn(2, n, dtype=torch.float64, requires_grad=True)
    initial = torch.randn(2, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, n, dtype=torch.float64)
    grads = torch.autograd.grad(
        recurrence.solve(plan_of(decays, decays), values, initial), (values, initial), cotangent
    )
    adjoint, expected = torch.zeros(2, dtype=torch.float64), []
    for t in reversed(range(n)):
        adjoint = cotangent[:, t] + decay * adjoint
        expected.append(decay * adjoint)
    assert worst_error(grads[0], torch.stack(expected[::-1], dim=1)) <= 1e-12
    torch.testing.assert_close(grads[1], decay * adjoint, rtol=1e-10, atol=1e-12)


def test_nothing_to_do():
    decay = torch.ones(1, 5, dtype=torch.float64)
    assert recurrence.solve(plan_of(decay, decay), torch.zeros(0, 5)).shape == (0, 5)
    assert recurrence.solve(plan_of(decay[:, :0], decay[:, :0]), torch.zeros(3, 0)).shape == (3, 0)
