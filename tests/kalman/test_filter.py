"""The filter of short rows against the joint Gaussian and statsmodels, under any mask."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.local_level import conditions, dense, log_likelihood

from verl_krpo import kalman
from verl_krpo.kalman import LocalLevel

BELIEFS = ["filtered", "predicted", "innovations", "posterior", "smoothed", "leave_one_out"]
EVERYTHING = [*BELIEFS, "log_likelihood"]
KINDS = ["none", "all", "nothing", "right", "left", "middle", "half", "sparse"]


def masks(seed, rows, time, kind):
    draw = torch.rand(rows, time, generator=torch.Generator().manual_seed(seed))
    lengths = (torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed + 1)) * (time + 1)).long()
    column = torch.arange(time)
    return {
        "none": None,
        "all": torch.ones(rows, time, dtype=torch.bool),
        "nothing": torch.zeros(rows, time, dtype=torch.bool),
        "right": column < lengths,
        "left": column >= lengths,
        "middle": (column >= lengths // 3) & (column < lengths),
        "half": draw < 0.5,
        "sparse": draw < 0.05,
    }[kind]


def observe(seed, rows, time, mask, dtype=torch.float64):
    """Noise, and NaN or Inf where nothing was observed."""
    z = torch.randn(rows, time, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    if mask is not None:
        z = torch.where(mask, z, torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)[seed % 3])
    return z


def expected(name, z, q, r, m0, p):
    """The belief at every observation of a row z (n,), (n, 2)."""
    if name == "innovations":
        beliefs = dense(z, conditions("predicted", len(z)), q, r, m0, p)
        return np.stack([z - beliefs[:, 0], beliefs[:, 1] + r], axis=1)
    return dense(z, conditions(name, len(z)), q, r, m0, p)


def spread(name, beliefs, observed, z, q, r, m0, p):
    """From the observations of a row to all of its positions: what the docstring says of masked ones."""
    if name == "innovations":
        rows = np.zeros((len(observed), 2))
        rows[observed] = beliefs
        return rows
    count = observed.cumsum()
    before = [(rank - 1, range(rank)) for rank in range(len(z) + 1)]
    everything = [(rank - 1, range(len(z))) for rank in range(len(z) + 1)]
    carried = dense(z, everything if name in ("smoothed", "leave_one_out") else before, q, r, m0, p)
    if name == "predicted":
        carried[:, 1] += q
    rows = carried[count]
    rows[observed] = beliefs
    return rows


@settings(max_examples=120)
@given(
    name=st.sampled_from(BELIEFS),
    seed=st.integers(0, 2**31),
    time=st.sampled_from([1, 2, 3, 8, 23]),
    kind=st.sampled_from(KINDS),
    q=st.sampled_from([0.0, 1e-9, 1e-5, 0.1, 20.0]),
    p=st.sampled_from([0.0, 1e-3, 1.0, 10.0]),
)
def test_equal_to_the_joint_gaussian(name, seed, time, kind, q, p):
    r, m0, rows = 0.5, 0.3, 3
    mask = masks(seed, rows, time, kind)
    z = observe(seed, rows, time, mask)
    result = torch.stack(getattr(kalman, name)(z, mask, LocalLevel(q, r, m0, p)), dim=-1)
    assert result.dtype == torch.float64
    for row in range(rows):
        observed = np.ones(time, dtype=bool) if mask is None else mask[row].numpy()
        values = z[row].numpy()[observed]
        beliefs = expected(name, values, q, r, m0, p)
        if name != "posterior":
            beliefs = spread(name, beliefs, observed, values, q, r, m0, p)
        elif not len(values):
            beliefs = np.array([[m0, p]])
        np.testing.assert_allclose(result[row].reshape(-1, 2).numpy(), beliefs, rtol=1e-10, atol=1e-10)


@settings(max_examples=80)
@given(
    name=st.sampled_from(["filtered", "predicted", "posterior", "smoothed", "leave_one_out"]),
    seed=st.integers(0, 2**31),
    time=st.sampled_from([1, 2, 3, 8, 23]),
    kind=st.sampled_from(KINDS),
    q=st.sampled_from([0.0, 1e-5, 0.1, 20.0]),
)
def test_weights_are_noises_of_their_own(name, seed, time, kind, q):
    """Against the joint Gaussian with R / w_i, where a weight of 0 is a noise that drowns everything."""
    r, m0, p = 0.5, 0.3, 1.0
    mask = masks(seed, 1, time, kind)
    z = observe(seed, 1, time, mask)
    weights = torch.empty(1, time, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(seed))
    weights[:, ::3] = 0.0
    result = torch.stack(getattr(kalman, name)(z, mask, LocalLevel(q, r, m0, p), weights), dim=-1)[0].reshape(-1, 2)
    observed = np.ones(time, dtype=bool) if mask is None else mask[0].numpy()
    values = z[0].numpy()[observed]
    if not len(values):
        return
    noise = r / np.maximum(weights[0].numpy()[observed], 1e-14)
    beliefs = dense(values, conditions(name, len(values)), q, noise, m0, p)
    found = result.numpy() if name == "posterior" else result.numpy()[observed]
    np.testing.assert_allclose(found, beliefs, rtol=1e-9, atol=1e-9)


def test_a_wrong_weight_is_named():
    z, model = torch.zeros(2, 3), LocalLevel(0.0, 1.0)
    weights = torch.ones(2, 3)
    weights[1, 2] = -1.0
    with pytest.raises(ValueError, match="weights=-1.0 in row 1, column 2"):
        kalman.filtered(z, None, model, weights)
    assert kalman.filtered(z, torch.tensor([[1, 1, 1], [1, 1, 0]]), model, weights).mean.isfinite().all()
    with pytest.raises(ValueError, match=r"weights have shape \(3,\)"):
        kalman.filtered(z, None, model, torch.ones(3))


@pytest.mark.parametrize("q", [0.0, 1e-5, 20.0])
@pytest.mark.parametrize("kind", ["none", "half"])
def test_log_likelihood_is_that_of_the_joint_gaussian(q, kind):
    mask = masks(0, 4, 17, kind)
    z = observe(1, 4, 17, mask)
    result = kalman.log_likelihood(z, mask, LocalLevel(q, 0.5, 0.3, 1.0))
    for row in range(4):
        values = z[row].numpy() if mask is None else z[row].numpy()[mask[row].numpy()]
        assert result[row].item() == pytest.approx(log_likelihood(values, q, 0.5, 0.3, 1.0), rel=1e-12)


@settings(max_examples=40)
@given(
    name=st.sampled_from(EVERYTHING),
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 6),
    time=st.integers(1, 20),
    kind=st.sampled_from(KINDS),
)
def test_rows_with_their_own_parameters(name, seed, rows, time, kind):
    draw = torch.Generator().manual_seed(seed)
    q, r, p = (10 ** (torch.rand(rows, generator=draw).double() * 8 - 6) for _ in range(3))
    p[0], q[rows // 2] = math.inf, 0.0
    m0 = torch.randn(rows, generator=draw).double()
    mask = masks(seed, rows, time, kind)
    z = observe(seed, rows, time, mask)
    together = getattr(kalman, name)(z, mask, LocalLevel(q, r, m0, p))
    for row in range(rows):
        model = LocalLevel(q[row].item(), r[row].item(), m0[row].item(), p[row].item())
        alone = getattr(kalman, name)(z[row : row + 1], None if mask is None else mask[row : row + 1], model)
        for a, b in zip(together, alone, strict=True) if isinstance(alone, tuple) else [(together, alone)]:
            torch.testing.assert_close(a[row : row + 1], b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (3, 0)])
def test_nothing_there(name, shape):
    z = torch.zeros(shape)
    model = LocalLevel(1.0, torch.ones(shape[0]), torch.ones(shape[0]), torch.ones(shape[0]))
    for mask in (None, z.bool()):
        result = getattr(kalman, name)(z, mask, model)
        result = result[0] if isinstance(result, tuple) else result
        assert result.shape == (shape if name not in ("posterior", "log_likelihood") else shape[:1])


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
    model = LocalLevel(q, r, m0, p)
    other = statsmodels_local_level(z[0].numpy(), q, r, m0, p)

    def close(result, expected):
        torch.testing.assert_close(result, torch.tensor(np.array(expected)), rtol=1e-9, atol=1e-9)

    filtered, predicted, smoothed = (
        getattr(kalman, name)(z, None, model) for name in ("filtered", "predicted", "smoothed")
    )
    close(filtered.mean[0], other.filtered_state[0])
    close(filtered.var[0], other.filtered_state_cov[0, 0])
    close(smoothed.mean[0], other.smoothed_state[0])
    close(smoothed.var[0], other.smoothed_state_cov[0, 0])
    first = 1 if math.isinf(p) else 0  # theirs is 0 before a diffuse first observation, ours the prior
    close(predicted.mean[0, first:], other.predicted_state[0, first:-1])
    close(predicted.var[0, first:], other.predicted_state_cov[0, 0, first:-1])
    close(kalman.log_likelihood(z, None, model)[0], other.llf)

    without = kalman.leave_one_out(z, None, model)
    for i in range(n):
        missing = z[0].numpy().copy()
        missing[i] = np.nan
        other = statsmodels_local_level(missing, q, r, m0, p)
        close(without.mean[0, i], other.smoothed_state[0, i])
        close(without.var[0, i], other.smoothed_state_cov[0, 0, i])


def test_the_only_observation_left_out_is_the_prior():
    for p in (0.0, 2.0, math.inf):
        mean, var = kalman.leave_one_out(torch.tensor([[5.0]]), None, LocalLevel(0.5, 1.0, 0.3, p))
        assert mean.item() == pytest.approx(0.3) and var.item() == p + 0.5


@pytest.mark.parametrize("kind", ["right", "left", "middle", "half", "sparse"])
@pytest.mark.parametrize("name", [*EVERYTHING, "filtered_mean"])
def test_what_lies_under_the_mask_changes_no_bit(name, kind):
    mask = masks(3, 6, 60, kind)
    clean = observe(3, 6, 60, None, torch.float32)
    model = LocalLevel(1e-3, 1.0, 0.0, 0.5)
    expected = getattr(kalman, name)(clean, mask, model)
    for junk in (math.nan, math.inf, -math.inf, 3e38):
        result = getattr(kalman, name)(torch.where(mask, clean, junk), mask, model)
        for a, b in zip(result, expected, strict=True):
            assert torch.equal(a, b) and not a.isnan().any()


@pytest.mark.parametrize("name", [*EVERYTHING, "filtered_mean"])
def test_padding_has_no_effect(name):
    z = torch.randn(4, 50, dtype=torch.float64)
    model = LocalLevel(1e-3, 1.0, 0.0, 0.5)
    expected = getattr(kalman, name)(z, None, model)
    padded = torch.nn.functional.pad(z, (7, 20), value=math.nan)
    result = getattr(kalman, name)(padded, padded.isfinite(), model)
    for a, b in zip(result, expected, strict=True):
        a = a if a.shape == b.shape else a[..., 7:-20]
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def test_masked_positions_carry_the_belief():
    z = torch.tensor([[9.0, 1.0, 9.0, 2.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[0, 1, 0, 1, 0]])
    mean, var = kalman.filtered(z, mask, LocalLevel(0.0, 1.0, 4.0, 1.0))
    torch.testing.assert_close(mean, torch.tensor([[4.0, 2.5, 2.5, 7 / 3, 7 / 3]]).double())
    torch.testing.assert_close(var, torch.tensor([[1.0, 1 / 2, 1 / 2, 1 / 3, 1 / 3]]).double())


@pytest.mark.parametrize("kind", ["none", "right", "left", "half", "nothing"])
@pytest.mark.parametrize("name", [*EVERYTHING, "filtered_mean", "steady"])
@pytest.mark.parametrize("p", [0.7, math.inf])
def test_gradients_through_the_observations(name, kind, p):
    mask = masks(5, 3, 11, kind)
    z = observe(5, 3, 11, None).requires_grad_()
    model = LocalLevel(0.1, 0.5, 0.0, p)
    gain = {"gain": "steady"} if name == "steady" else {}
    call = getattr(kalman, "filtered_mean" if name == "steady" else name)

    def means(values):
        result = call(values, mask, model, **gain)
        return result[0] if isinstance(result, tuple) else result

    assert torch.autograd.gradcheck(means, (z,))


def test_autocast_changes_nothing():
    z, model = torch.randn(4, 60), LocalLevel(1e-3, 1.0, 0.0, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [kalman.filtered_mean(z, None, model), *kalman.leave_one_out(z, None, model)]
    outside = [kalman.filtered_mean(z, None, model), *kalman.leave_one_out(z, None, model)]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(inside, outside, strict=True))


def test_arguments_are_left_as_they_were():
    z, mask = torch.randn(3, 50), torch.rand(3, 50) > 0.5
    copies = z.clone(), mask.clone()
    for name in [*EVERYTHING, "filtered_mean"]:
        getattr(kalman, name)(z, mask, LocalLevel(1e-3, 1.0, 0.0, 0.5))
    assert torch.equal(z, copies[0]) and torch.equal(mask, copies[1])


def test_views_are_read_as_they_are():
    z = torch.randn(50, 6, dtype=torch.float64).t()[::2]
    mask = (torch.rand(50, 6) > 0.3).t()[::2]
    for name in [*BELIEFS, "filtered_mean"]:
        for m in (None, mask):
            a = getattr(kalman, name)(z, m, LocalLevel(1e-3, 1.0, 0.0, 0.5))
            b = getattr(kalman, name)(z.contiguous(), m, LocalLevel(1e-3, 1.0, 0.0, 0.5))
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("process_var", -1.0),
        ("process_var", math.nan),
        ("process_var", math.inf),
        ("measurement_var", 0.0),
        ("measurement_var", -0.25),
        ("measurement_var", math.inf),
        ("init_mean", math.inf),
        ("init_var", -2.0),
        ("init_var", math.nan),
    ],
)
def test_bad_parameters_are_named(name, value):
    good = {"process_var": 1.0, "measurement_var": 1.0, "init_var": 1.0}
    with pytest.raises(ValueError, match=f"{name}={value}"):
        LocalLevel(**{**good, name: value})
    with pytest.raises(ValueError, match=f"{name}={value} in row 1"):
        LocalLevel(**{**good, name: torch.tensor([1.0, value, 1.0])})


@pytest.mark.parametrize("name", [*EVERYTHING, "filtered_mean"])
def test_bad_arguments_are_named(name):
    z, model = torch.zeros(3, 5), LocalLevel(1.0, 1.0)
    call = getattr(kalman, name)
    with pytest.raises(ValueError, match=r"mask has shape \(3, 4\), observations \(3, 5\)"):
        call(z, torch.ones(3, 4), model)
    with pytest.raises(ValueError, match="mask=2 in row 1, column 3"):
        mask = torch.ones(3, 5, dtype=torch.long)
        mask[1, 3] = 2
        call(z, mask, model)
    if name == "filtered_mean":
        with pytest.raises(ValueError, match="gain='quick'"):
            call(z, None, model, gain="quick")
        with pytest.raises(ValueError, match=r"measurement_var is a tensor of shape \(3,\)"):
            call(z, None, LocalLevel(1.0, torch.ones(3)))
    else:
        with pytest.raises(ValueError, match=r"must be a real \(rows, time\) tensor, got \(4,\)"):
            call(torch.zeros(4), None, model)
        with pytest.raises(ValueError, match="complex"):
            call(torch.zeros(3, 5, dtype=torch.complex64), None, model)
        with pytest.raises(ValueError, match=r"measurement_var has shape \(4,\)"):
            call(z, None, LocalLevel(1.0, torch.ones(4)))
