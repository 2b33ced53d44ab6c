import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_krpo.kalman import filter as kalman
from verl_krpo.kalman import naive

BELIEFS = ["filtered", "predicted", "innovations", "posterior", "smoothed", "leave_one_out"]
EVERYTHING = [*BELIEFS, "log_likelihood"]


@pytest.fixture(autouse=True, scope="module")
def poisoned():
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def variances(q, r, p):
    return {"process_var": q, "measurement_var": r, "init_var": p}


def masks(seed, batch, time, kind):
    draw = torch.rand(batch, time, generator=torch.Generator().manual_seed(seed))
    lengths = (torch.rand(batch, 1, generator=torch.Generator().manual_seed(seed + 1)) * (time + 1)).long()
    column = torch.arange(time)
    if kind == "none":
        return None
    if kind == "all":
        return torch.ones(batch, time, dtype=torch.bool)
    if kind == "nothing":
        return torch.zeros(batch, time, dtype=torch.bool)
    if kind == "right":
        return column < lengths
    if kind == "left":
        return column >= lengths
    if kind == "middle":
        return (column >= lengths // 3) & (column < lengths)
    return draw < {"dense": 0.9, "half": 0.5, "sparse": 0.05}[kind]


KINDS = ["none", "all", "nothing", "right", "left", "middle", "dense", "half", "sparse"]


def observe(seed, batch, time, mask, q, r, p, dtype=torch.float64):
    """Noise, and NaN or Inf where nothing was observed; one constant where Q = R = 0 allows nothing else."""
    z = torch.randn(batch, time, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    if q == r == 0:
        z = torch.full_like(z, 0.25 if p == 0 else 2.0)
    if mask is not None:
        z = torch.where(mask, z, torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)[seed % 3])
    return z


def assert_beliefs_close(result, expected, tolerance, var_floor=0.0):
    """Means against the largest one, variances each for itself."""
    assert result[0].shape == expected[0].shape and result[0].dtype == expected[0].dtype
    scale = expected[0].abs().max() if expected[0].numel() else 0.0
    torch.testing.assert_close(result[0], expected[0], rtol=0, atol=float(tolerance * max(scale, 1e-300)))
    torch.testing.assert_close(result[1], expected[1], rtol=tolerance, atol=var_floor)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(EVERYTHING),
    seed=st.integers(0, 2**31),
    batch=st.integers(0, 5),
    time=st.sampled_from([0, 1, 2, 3, 8, 31, 64]),
    kind=st.sampled_from(KINDS),
    q=st.sampled_from([0.0, 1e-14, 1e-5, 0.1, 1.0, 1e6]),
    r=st.sampled_from([0.0, 1e-2, 1.0]),
    p=st.sampled_from([0.0, 1e-3, 1.0, 1e6, math.inf]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_equal_to_the_naive_filter(name, seed, batch, time, kind, q, r, p, dtype):
    mask = masks(seed, batch, time, kind)
    z = observe(seed, batch, time, mask, q, r, p, dtype)
    model = {**variances(q, r, p), "init_mean": 0.25}
    result, expected = getattr(kalman, name)(z, mask, **model), getattr(naive, name)(z, mask, **model)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-7
    if name == "log_likelihood":
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
    else:
        # The naive smoother subtracts variances: it is exact to the largest of them only.
        largest = max(v for v in (q, r, p) if math.isfinite(v))
        floor = 1e-14 * largest if name in ("smoothed", "leave_one_out") else 1e-300
        assert_beliefs_close(result, expected, tolerance, floor)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(EVERYTHING),
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 6),
    time=st.one_of(st.integers(1, 40), st.integers(kalman.SHORT, kalman.SHORT + 30)),
    kind=st.sampled_from(KINDS),
)
def test_rows_with_their_own_parameters(name, seed, batch, time, kind):
    """Step by step where rows are short, in closed form where they are long, both as each row alone."""
    draw = torch.Generator().manual_seed(seed)
    q, r, p = (10 ** (torch.rand(batch, generator=draw).double() * 8 - 6) for _ in range(3))
    p[0], q[batch // 2] = math.inf, 0.0
    if batch > 1:
        r[batch // 2 - 1] = 0.0
    m0 = torch.randn(batch, generator=draw).double()
    mask = masks(seed, batch, time, kind)
    z = observe(seed, batch, time, mask, 1.0, 1.0, 1.0)
    together = getattr(kalman, name)(z, mask, **variances(q, r, p), init_mean=m0)
    for row in range(batch):
        only = slice(row, row + 1)
        alone = getattr(kalman, name)(
            z[only],
            None if mask is None else mask[only],
            **variances(q[row].item(), r[row].item(), p[row].item()),
            init_mean=m0[row].item(),
        )
        for a, b in zip(together, alone, strict=True) if isinstance(alone, tuple) else [(together, alone)]:
            torch.testing.assert_close(a[only], b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("time", [0, 5])
def test_no_rows_with_their_own_parameters(name, time):
    none, z = torch.zeros(0), torch.zeros(0, time)
    for mask in (None, z.bool()):
        result = getattr(kalman, name)(z, mask, **variances(1.0, none, none), init_mean=none)
        result = result[0] if isinstance(result, tuple) else result
        assert result.shape == (z.shape if name not in ("posterior", "log_likelihood") else (0,))


def dense_beliefs(z, q, r, m0, p):
    """Every belief by conditioning the joint Gaussian of x_1..x_n and z_1..z_n."""
    n = len(z)
    steps = np.minimum.outer(np.arange(1, n + 1), np.arange(1, n + 1))
    cov_x = p + q * steps
    cov_z = cov_x + r * np.eye(n)

    def given(i, which):
        if not which:
            return m0, cov_x[i, i]
        cross, inner = cov_x[i, which], cov_z[np.ix_(which, which)]
        weights = np.linalg.solve(inner, cross)
        return m0 + weights @ (z[which] - m0), cov_x[i, i] - weights @ cross

    everything = list(range(n))
    sign, logdet = np.linalg.slogdet(cov_z)
    likelihood = -0.5 * (n * math.log(2 * math.pi) + logdet + (z - m0) @ np.linalg.solve(cov_z, z - m0))
    return {
        "filtered": [given(i, everything[: i + 1]) for i in range(n)],
        "predicted": [given(i, everything[:i]) for i in range(n)],
        "smoothed": [given(i, everything) for i in range(n)],
        "leave_one_out": [given(i, everything[:i] + everything[i + 1 :]) for i in range(n)],
        "posterior": [given(n - 1, everything)],
    }, likelihood


@pytest.mark.parametrize("n", [1, 2, 12, 40])
@pytest.mark.parametrize("q", [0.0, 1e-5, 0.3, 20.0])
@pytest.mark.parametrize("p", [0.0, 1e-3, 1.0])
def test_equal_to_the_joint_gaussian(n, q, p):
    torch.manual_seed(n)
    z = torch.randn(1, n, dtype=torch.float64)
    model = {**variances(q, 0.5, p), "init_mean": 0.3}
    beliefs, likelihood = dense_beliefs(z[0].numpy(), q, 0.5, 0.3, p)
    for name, expected in beliefs.items():
        result = torch.stack(getattr(kalman, name)(z, **model), dim=-1).reshape(-1, 2)
        torch.testing.assert_close(result, torch.tensor(np.array(expected)), rtol=1e-9, atol=1e-9)
    assert kalman.log_likelihood(z, **model).item() == pytest.approx(likelihood, rel=1e-9)


def statsmodels_local_level(z, q, r, m0, p):
    from statsmodels.tsa.statespace.initialization import Initialization
    from statsmodels.tsa.statespace.kalman_smoother import KalmanSmoother

    model = KalmanSmoother(k_endog=1, k_states=1)
    model.bind(np.ascontiguousarray(z[:, None]))
    model["design", 0, 0] = model["transition", 0, 0] = model["selection", 0, 0] = 1.0
    model["obs_cov", 0, 0], model["state_cov", 0, 0] = r, q
    if math.isinf(p):
        model.initialize(Initialization(1, "diffuse"))
    else:  # statsmodels starts from the prediction of x_1
        model.initialize(Initialization(1, "known", constant=np.array([m0]), stationary_cov=np.array([[p + q]])))
    model.tolerance = 0  # no switching to the steady state
    return model.smooth()


@pytest.mark.parametrize("n", [2, 12, 60])
@pytest.mark.parametrize("q", [0.0, 1e-4, 0.3, 20.0])
@pytest.mark.parametrize("p", [0.0, 1e-3, 1.0, math.inf])
def test_equal_to_statsmodels(n, q, p):
    torch.manual_seed(n)
    z, r, m0 = torch.randn(1, n, dtype=torch.float64).cumsum(1), 0.5, 0.3
    model = {**variances(q, r, p), "init_mean": m0}
    other = statsmodels_local_level(z[0].numpy(), q, r, m0, p)

    def close(result, expected):
        torch.testing.assert_close(result, torch.tensor(np.array(expected)), rtol=1e-9, atol=1e-9)

    filtered, predicted, smoothed = (
        getattr(kalman, name)(z, **model) for name in ("filtered", "predicted", "smoothed")
    )
    close(filtered.mean[0], other.filtered_state[0])
    close(filtered.var[0], other.filtered_state_cov[0, 0])
    close(smoothed.mean[0], other.smoothed_state[0])
    close(smoothed.var[0], other.smoothed_state_cov[0, 0])
    first = 1 if math.isinf(p) else 0  # theirs is 0 before a diffuse first observation, ours the prior
    close(predicted.mean[0, first:], other.predicted_state[0, first:-1])
    close(predicted.var[0, first:], other.predicted_state_cov[0, 0, first:-1])
    close(kalman.log_likelihood(z, **model)[0], other.llf)

    without = kalman.leave_one_out(z, **model)
    for i in range(n):
        missing = z[0].numpy().copy()
        missing[i] = np.nan
        other = statsmodels_local_level(missing, q, r, m0, p)
        close(without.mean[0, i], other.smoothed_state[0, i])
        close(without.var[0, i], other.smoothed_state_cov[0, 0, i])


def test_the_only_observation_left_out_is_the_prior():
    for p in (0.0, 2.0, math.inf):
        mean, var = kalman.leave_one_out(torch.tensor([[5.0]]), **variances(0.5, 1.0, p), init_mean=0.3)
        assert mean.item() == pytest.approx(0.3) and var.item() == p + 0.5


@pytest.mark.parametrize(
    ("q", "p", "dtype"),
    [
        (0.0, 1.0, torch.float32),
        (0.0, math.inf, torch.bfloat16),
        (1e-14, 0.0, torch.float32),
        (1e-6, 0.0, torch.bfloat16),
        (1e-6, 0.0, torch.float32),
        (1e-4, math.inf, torch.float32),
        (1e-2, 1e6, torch.bfloat16),
        (1.0, 0.0, torch.float32),
        (1e6, 1.0, torch.bfloat16),
    ],
)
def test_long_rows(q, p, dtype):
    time = 131_072
    torch.manual_seed(1)
    noise = torch.randn(time)
    flipping = torch.ones(time)
    flipping[1::2] = -1  # the state is far smaller than the observations
    z = torch.stack([noise, flipping, noise.cumsum(0) * 1e-2]).to(dtype)
    holes = torch.rand(3, time) > 0.3
    right = torch.arange(time) < torch.tensor([[time], [time // 2], [1]])
    for mask in (None, holes, right):
        seen = z if mask is None else torch.where(mask, z, torch.nan)
        result = kalman.filtered_mean(seen, mask, **variances(q, 1.0, p), init_mean=0.1)
        assert result.dtype == torch.float32
        expected = naive.filtered_mean(z.double(), mask, **variances(q, 1.0, p), init_mean=0.1)
        error = ((result - expected).abs().amax(dim=1) / expected.abs().amax(dim=1)).max().item()
        assert error <= 5e-7, error


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(0, 5),
    time=st.sampled_from([0, 1, 2, 3, 31, 1024, 1025]),
    kind=st.sampled_from(KINDS),
    q=st.sampled_from([0.0, 1e-14, 1e-5, 0.1, 1.0, 1e6]),
    r=st.sampled_from([0.0, 1e-2, 1.0]),
    p=st.sampled_from([0.0, 1e-3, 1.0, 1e6, math.inf]),
    gain=st.sampled_from(["scheduled", "steady"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    mask_dtype=st.sampled_from([torch.bool, torch.int64, torch.float32, torch.bfloat16]),
)
def test_filtered_mean(seed, batch, time, kind, q, r, p, gain, dtype, mask_dtype):
    mask = masks(seed, batch, time, kind)
    z = observe(seed, batch, time, mask, q, r, p, dtype)
    model = {**variances(q, r, p), "init_mean": 0.25, "gain": gain}
    result = kalman.filtered_mean(z, None if mask is None else mask.to(mask_dtype), **model)
    expected = naive.filtered_mean(z, mask, **model)
    assert result.shape == z.shape and result.dtype == expected.dtype
    scale = expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(result, expected, rtol=0, atol=scale * (1e-11 if dtype == torch.float64 else 1.5e-7))


@pytest.mark.parametrize("kind", ["right", "left", "middle", "half", "sparse"])
@pytest.mark.parametrize("name", [*EVERYTHING, "filtered_mean"])
def test_what_lies_under_the_mask_changes_no_bit(name, kind):
    mask = masks(3, 6, 300, kind)
    clean = observe(3, 6, 300, None, 1.0, 1.0, 1.0, torch.float32)
    model = variances(1e-3, 1.0, 0.5)
    expected = getattr(kalman, name)(clean, mask, **model)
    for junk in (math.nan, math.inf, -math.inf, 3e38):
        result = getattr(kalman, name)(torch.where(mask, clean, junk), mask, **model)
        for a, b in zip(result, expected, strict=True):
            assert torch.equal(a, b) and not a.isnan().any()


@pytest.mark.parametrize("name", [*EVERYTHING, "filtered_mean"])
def test_padding_has_no_effect(name):
    z = torch.randn(4, 100, dtype=torch.float64)
    model = variances(1e-3, 1.0, 0.5)
    expected = getattr(kalman, name)(z, **model)
    padded = torch.nn.functional.pad(z, (7, 20), value=math.nan)
    result = getattr(kalman, name)(padded, padded.isfinite(), **model)
    for a, b in zip(result, expected, strict=True):
        a = a if a.shape == b.shape else a[..., 7:-20]
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def test_masked_positions_carry_the_belief():
    z = torch.tensor([[9.0, 1.0, 9.0, 2.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[0, 1, 0, 1, 0]])
    model = {**variances(0.0, 1.0, 1.0), "init_mean": 4.0}
    mean, var = kalman.filtered(z, mask, **model)
    torch.testing.assert_close(mean, torch.tensor([[4.0, 2.5, 2.5, 7 / 3, 7 / 3]]).double())
    torch.testing.assert_close(var, torch.tensor([[1.0, 1 / 2, 1 / 2, 1 / 3, 1 / 3]]).double())


@pytest.mark.parametrize("kind", ["none", "right", "left", "half", "nothing"])
@pytest.mark.parametrize("name", [*EVERYTHING, "filtered_mean", "steady"])
@pytest.mark.parametrize("p", [0.7, math.inf])
def test_gradients_through_the_observations(name, kind, p):
    mask = masks(5, 3, 11, kind)
    z = observe(5, 3, 11, None, 1.0, 1.0, 1.0).requires_grad_()
    model = variances(0.1, 0.5, p)
    if name == "steady":
        name, model = "filtered_mean", {**model, "gain": "steady"}

    def means(values):
        result = getattr(kalman, name)(values, mask, **model)
        return result[0] if isinstance(result, tuple) else result

    assert torch.autograd.gradcheck(means, (z,))


def test_nothing_is_recorded_where_no_gradient_is_asked():
    assert not kalman.filtered(torch.randn(2, 5), **variances(1.0, 1.0, 1.0)).mean.requires_grad
    z = torch.randn(2, 5, requires_grad=True)
    with torch.no_grad():
        assert not kalman.filtered_mean(z, **variances(1.0, 1.0, 1.0)).requires_grad


def test_autocast_changes_nothing():
    z = torch.randn(4, 200)
    model = variances(1e-3, 1.0, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [kalman.filtered_mean(z, **model), *kalman.leave_one_out(z, **model)]
    outside = [kalman.filtered_mean(z, **model), *kalman.leave_one_out(z, **model)]
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(inside, outside, strict=True))


def test_arguments_are_left_as_they_were():
    z, mask = torch.randn(3, 50), torch.rand(3, 50) > 0.5
    copies = z.clone(), mask.clone()
    for name in [*EVERYTHING, "filtered_mean"]:
        getattr(kalman, name)(z, mask, **variances(1e-3, 1.0, 0.5))
    assert torch.equal(z, copies[0]) and torch.equal(mask, copies[1])


def test_views_are_read_as_they_are():
    z = torch.randn(50, 6, dtype=torch.float64).t()[::2]
    mask = (torch.rand(50, 6) > 0.3).t()[::2]
    for name in [*BELIEFS, "filtered_mean"]:
        for m in (None, mask):
            a = getattr(kalman, name)(z, m, **variances(1e-3, 1.0, 0.5))
            b = getattr(kalman, name)(z.contiguous(), m, **variances(1e-3, 1.0, 0.5))
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", [*EVERYTHING, "filtered_mean"])
def test_bad_arguments_are_named(name):
    def call(observations=None, mask=None, **changes):
        z = torch.zeros(3, 5) if observations is None else observations
        return getattr(kalman, name)(z, mask, **{**variances(1.0, 1.0, 1.0), **changes})

    for key in ("process_var", "measurement_var", "init_var"):
        for value in (-1.0, math.nan):
            with pytest.raises(ValueError, match=f"{key}={value}"):
                call(**{key: value})
    with pytest.raises(ValueError, match="init_mean=inf"):
        call(init_mean=math.inf)
    with pytest.raises(ValueError, match=r"mask has shape \(3, 4\), observations \(3, 5\)"):
        call(mask=torch.ones(3, 4))
    with pytest.raises(ValueError, match="mask=2 in row 1, column 3"):
        call(mask=torch.ones(3, 5, dtype=torch.long).index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(2)))
    with pytest.raises(ValueError, match=r"observations must be a \(batch, time\) tensor, got \(4,\)"):
        call(torch.zeros(4))
    with pytest.raises(ValueError, match="complex"):
        call(torch.zeros(3, 5, dtype=torch.complex64))
    if name != "filtered_mean":
        with pytest.raises(ValueError, match=r"measurement_var has shape \(4,\)"):
            call(measurement_var=torch.ones(4))
    else:
        with pytest.raises(ValueError, match="measurement_var is a tensor"):
            call(measurement_var=torch.ones(3))
        with pytest.raises(ValueError, match="gain='quick'"):
            call(gain="quick")


@pytest.mark.parametrize("name", [*EVERYTHING, "filtered_mean"])
def test_contradicting_a_certain_state(name):
    z = torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.5, 0.25]])
    call = getattr(kalman, name)
    with pytest.raises(ValueError, match="row 1 certain, 0.5, but its observation 2 is 0.25"):
        call(z, **variances(0.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="row 0 certain, 0.0, but its observation 0 is 0.5"):
        call(z, **variances(0.0, 0.0, 0.0))
    call(z, torch.tensor([[1, 1, 1], [1, 1, 0]]), **variances(0.0, 0.0, 1.0))
    call(z[:1], **variances(0.0, 0.0, 0.0), init_mean=0.5)
    call(z, **variances(1.0, 0.0, 0.0))
