"""The KPO loss against a float64 loss that walks token by token and differentiates by autograd."""

import math

import pytest
import torch
from reference.metrics import KPO as KEYS

from verl_krpo.config import Gain, KpoConfig
from verl_krpo.kalman.noise import by_differences
from verl_krpo.lab.bench.kpo import published_loss
from verl_krpo.plugin import loss as door
from verl_krpo.policy_loss.kpo import kpo as token_losses

MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]


def compute_policy_loss(*args, **kwargs):
    """By verl's door, which adds the tokens up as verl does."""
    pytest.importorskip("verl")
    return door.compute_policy_loss(*args, **kwargs)


@pytest.mark.parametrize("clip", [True, False])
def test_the_pure_function_by_tokens(kpo_reference, clip):
    """With torch alone: the loss of every token, and its gradient."""
    batch = kpo_reference.batch()
    new, exact = batch.new.clone().requires_grad_(), batch.new.double().requires_grad_()
    settings = KpoConfig(process_var=1e-2, clip=clip)
    losses, metrics = token_losses(new, batch.old, batch.adv, batch.mask, settings, clip_low=2e-3, clip_high=3e-3)
    expected = kpo_reference.losses(batch.old, exact, batch.adv, batch.mask, 2e-3, 3e-3, q_var=1e-2, clip=clip)
    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=1e-7)
    losses.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(new.grad.double(), torch.where(batch.mask, exact.grad, 0.0), rtol=2e-6, atol=1e-7)
    assert {f"actor/{key}" for key in metrics} == KEYS


def check(reference, batch, mode, config, kpo, weights=None, rtol=2e-6, atol=1e-7):
    """Ours equals the reference within float32 rounding, and is exactly 0 under the mask."""
    new = batch.new.detach().clone().requires_grad_()
    loss, metrics = compute_policy_loss(batch.old, new, batch.adv, batch.mask, mode, config, weights)
    loss.backward()
    expected_new = batch.new.detach().double().clone().requires_grad_()
    expected = reference.loss(
        batch.old, expected_new, batch.adv, batch.mask, mode, config, weights,
        q_var=kpo.process_var, r_var=kpo.measurement_var, p_var=kpo.init_var, clip=kpo.clip,
        steady=kpo.gain is Gain.steady, kappa=kpo.innovation_clip, log_max=kpo.ratio_log_max,
    )  # fmt: skip
    expected.backward()
    grad = torch.where(batch.mask.bool(), expected_new.grad, 0.0)
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(new.grad.double(), grad, rtol=rtol, atol=atol * grad.abs().max().item())
    assert (new.grad[~batch.mask.bool()] == 0).all()
    assert set(metrics) == KEYS
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
    return loss, metrics


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip", [True, False])
def test_equals_the_published_loss(kpo_reference, mode, clip):
    kpo = KpoConfig(process_var=1e-2, clip=clip)
    check(kpo_reference, kpo_reference.batch(), mode, kpo_reference.config(2e-3, 3e-3, kpo), kpo)


@pytest.mark.parametrize("mode", MODES)
def test_equals_the_published_loss_at_its_defaults(kpo_reference, mode):
    check(kpo_reference, kpo_reference.batch(rows=3, width=700), mode, kpo_reference.config(), KpoConfig())


def test_gradient_of_the_published_code(kpo_reference):
    """At its default setting, on rows without holes, as near as its float32 gains are to the exact ones."""
    make = torch.Generator().manual_seed(18)
    old = -torch.rand(4, 900, generator=make)
    new = old + 0.5 * torch.randn(4, 900, generator=make)
    mask = torch.arange(900)[None] < torch.tensor([[900], [700], [333], [2]])
    adv = torch.randn(4, 1, generator=make).expand(4, 900)
    exact, _ = kpo_reference.filter((new - old).double(), mask, 1e-6, 1.0, 0.0)
    grads = {}
    for loss in (compute_policy_loss, published_loss):
        leaf = new.clone().requires_grad_()
        # A clip range that nothing reaches: a ratio next to the bound may fall on either side.
        loss(old, leaf, adv, mask, "seq-mean-token-mean", kpo_reference.config(0.2, 0.2))[0].backward()
        grads[loss] = leaf.grad
    # The gradient is proportional to the ratio, exp(x): off by 3 % of x at most.
    torch.testing.assert_close(
        grads[compute_policy_loss], grads[published_loss], rtol=0.03 * exact.abs().max().item(), atol=0
    )


def test_gradient_by_finite_differences(kpo_reference):
    """Ours is the derivative of the float64 loss in which the filtered ratio is held fixed."""
    pytest.importorskip("verl")
    from verl.trainer.ppo.core_algos import agg_loss

    batch = kpo_reference.batch(rows=3, width=17, seed=19, dtype=torch.float64)
    kpo = KpoConfig(process_var=1e-2)
    config = kpo_reference.config(1e-2, 1e-2, kpo)
    new, old, adv = (torch.where(batch.mask, tensor, 0.0) for tensor in (batch.new, batch.old, batch.adv))
    x, _ = kpo_reference.filter(new - old, batch.mask, 1e-2, 1.0, 0.0)
    anchor = new.clone()

    def frozen(log_prob):
        ratio = (log_prob - anchor + x).exp()
        loss = torch.maximum(-adv * ratio, -adv * ratio.clamp(0.99, 1.01))
        return agg_loss(loss, batch.mask, "token-mean")

    leaf = new.clone().requires_grad_()
    assert torch.autograd.gradcheck(frozen, leaf, eps=1e-7, atol=1e-7)
    (expected,) = torch.autograd.grad(frozen(leaf), leaf)
    loss, _ = compute_policy_loss(old, leaf, adv, batch.mask, "token-mean", config)
    loss.backward()
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("q_var", [0.0, 1e-9, 1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("init_var", [0.0, 0.5])
def test_every_ratio_of_variances(kpo_reference, q_var, init_var):
    kpo = KpoConfig(process_var=q_var, init_var=init_var)
    check(kpo_reference, kpo_reference.batch(seed=3), "token-mean", kpo_reference.config(0.05, 0.1, kpo), kpo)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("gain", list(Gain))
@pytest.mark.parametrize("kappa", [0.05, 1.0])
def test_clipped_innovations(kpo_reference, clip, gain, kappa):
    kpo = KpoConfig(process_var=1e-2, measurement_var=0.1, clip=clip, gain=gain, innovation_clip=kappa)
    batch = kpo_reference.batch(rows=3, width=600, seed=14)
    _, metrics = check(kpo_reference, batch, "token-mean", kpo_reference.config(2e-3, 3e-3, kpo), kpo)
    raw = torch.where(batch.mask, batch.new.double() - batch.old.double(), 0.0)
    _, hits = kpo_reference.filter(raw, batch.mask, 1e-2, 0.1, 0.0, gain is Gain.steady, kappa)
    assert metrics["actor/kpo_innovation_clipfrac"] == pytest.approx((hits.sum() / batch.mask.sum()).item())
    assert 0 < metrics["actor/kpo_innovation_clipfrac"] < 1


def test_padding_saturates_nothing(kpo_reference):
    """Behind the last token the state is far from the zeros that stand there."""
    new, old = torch.full((2, 400), 5.0), torch.zeros(2, 400)
    mask = torch.arange(400) < torch.tensor([[100], [7]])
    config = kpo_reference.config(kpo=KpoConfig(process_var=1.0, measurement_var=1e-3, innovation_clip=1.0))
    _, metrics = compute_policy_loss(old, new, torch.ones(2, 400), mask, "token-mean", config)
    _, hits = kpo_reference.filter(new.double(), mask, 1.0, 1e-3, 0.0, False, 1.0)
    assert metrics["actor/kpo_innovation_clipfrac"] == pytest.approx(hits.sum().item() / 107)


def test_measured_noise(kpo_reference):
    """With measurement_var=batch the loss is that of the Q and R which the batch's moments give."""
    batch = kpo_reference.batch(rows=6, width=900, seed=15)
    drift = torch.randn(6, 900, generator=torch.Generator().manual_seed(16)).cumsum(1) * 0.2
    batch.new = torch.where(batch.mask, batch.new + drift, batch.new)
    raw = torch.where(batch.mask, batch.new - batch.old, 0.0)
    process_var, measurement_var = by_differences(raw, batch.mask)
    assert 0.1 < process_var / measurement_var < 0.9  # about 0.4, and at neither bound
    measured = kpo_reference.config(0.2, 0.2, KpoConfig(measurement_var="batch", innovation_clip=2.0))
    given = KpoConfig(process_var=process_var, measurement_var=measurement_var, innovation_clip=2.0)
    loss, metrics = check(kpo_reference, batch, "token-mean", measured, given, rtol=5e-6)
    assert metrics["actor/kpo_measurement_var"] == pytest.approx(measurement_var)


def test_measured_noise_of_equal_policies(kpo_reference):
    batch = kpo_reference.batch(seed=17)
    old = torch.where(batch.mask, batch.old, 0.0)
    config = kpo_reference.config(kpo=KpoConfig(measurement_var="batch"))
    _, metrics = compute_policy_loss(old, old, batch.adv, batch.mask, "token-mean", config)
    assert metrics["actor/kpo_ratio_std_filtered"] == metrics["actor/kpo_measurement_var"] == 0.0
    assert set(metrics) == KEYS


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("gain", list(Gain))
def test_gains(kpo_reference, clip, gain):
    kpo = KpoConfig(process_var=1e-3, gain=gain, clip=clip)
    check(kpo_reference, kpo_reference.batch(seed=4), "seq-mean-token-mean", kpo_reference.config(1e-3, 1e-3, kpo), kpo)


def test_rollout_weights(kpo_reference):
    batch, kpo = kpo_reference.batch(seed=5), KpoConfig(process_var=1e-2)
    weights = torch.where(batch.mask, torch.rand(batch.mask.shape), float("nan"))
    weights[:, ::7] = torch.where(batch.mask[:, ::7], 0.0, float("inf"))
    check(kpo_reference, batch, "token-mean", kpo_reference.config(kpo=kpo), kpo, weights)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.int32, torch.float32])
def test_mask_of_any_type(kpo_reference, kind):
    batch, kpo = kpo_reference.batch(seed=6), KpoConfig(process_var=1e-2)
    batch.mask = batch.mask.to(kind)
    check(kpo_reference, batch, "token-mean", kpo_reference.config(kpo=kpo), kpo)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_and_autocast(kpo_reference, dtype, autocast):
    batch, kpo = kpo_reference.batch(seed=7, width=200, dtype=dtype), KpoConfig(process_var=1e-3)
    config = kpo_reference.config(kpo=kpo)
    new = batch.new.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss, _ = compute_policy_loss(batch.old, new, batch.adv, batch.mask, "token-mean", config)
    loss.backward()
    exact = batch.new.double().requires_grad_()
    expected = kpo_reference.loss(batch.old, exact, batch.adv, batch.mask, "token-mean", config, q_var=1e-3)
    expected.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert new.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-7)
    grad = torch.where(batch.mask, exact.grad, 0.0)
    torch.testing.assert_close(new.grad.double(), grad, rtol=max(2e-6, torch.finfo(dtype).eps), atol=1e-9)


def test_capped_ratio_has_no_gradient(kpo_reference):
    batch, kpo = kpo_reference.batch(seed=8), KpoConfig(process_var=1.0, clip=False, ratio_log_max=0.1)
    check(kpo_reference, batch, "token-mean", kpo_reference.config(kpo=kpo), kpo)


def test_on_policy_is_reinforce(kpo_reference):
    batch = kpo_reference.batch(seed=9)
    old = torch.where(batch.mask, batch.old, 0.0)
    new = old.clone().requires_grad_()
    loss, metrics = compute_policy_loss(old, new, batch.adv, batch.mask, "token-mean", kpo_reference.config())
    loss.backward()
    reinforce = torch.where(batch.mask, -batch.adv, 0.0) / batch.mask.sum()
    torch.testing.assert_close(new.grad, reinforce, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.detach(), reinforce.sum(), rtol=1e-5, atol=1e-7)
    assert metrics["actor/kpo_ratio_std_filtered"] == metrics["actor/ppo_kl"] == 0.0
    assert metrics["actor/kpo_ratio_max_raw"] == 1.0


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing_to_learn_from(kpo_reference, shape):
    new = torch.zeros(shape, requires_grad=True)
    nothing, config = torch.zeros(shape), kpo_reference.config(0.2, 0.2)
    loss, metrics = compute_policy_loss(nothing, new, nothing, nothing.bool(), "token-mean", config)
    loss.backward()
    assert loss.item() == 0.0 and new.grad.shape == shape
    assert all(value == 0.0 for key, value in metrics.items() if key != "actor/kpo_measurement_var")


@pytest.mark.parametrize("clip", [True, False])
def test_transposed_log_probs_are_read_as_they_stand(kpo_reference, clip):
    """Log-probs that lie in memory column by column give the same loss, gradient and metrics."""
    batch, kpo = kpo_reference.batch(rows=5, width=60, seed=10), KpoConfig(process_var=1e-2, clip=clip)
    config = kpo_reference.config(0.02, 0.02, kpo)
    found = []
    for lay in (torch.Tensor.contiguous, lambda x: x.T.contiguous().T):
        old, new, adv, mask = (lay(x.detach()) for x in (batch.old, batch.new, batch.adv, batch.mask))
        new.requires_grad_()
        loss, metrics = compute_policy_loss(old, new, adv, mask, "token-mean", config)
        loss.backward()
        found.append((loss.item(), metrics, new.grad))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5, abs=1e-9)
    torch.testing.assert_close(found[1][2], found[0][2], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_advantages_of_any_dtype(kpo_reference, dtype):
    """The arithmetic has one precision, also where it decides that a ratio stands at its upper bound."""
    batch, kpo = kpo_reference.batch(seed=12), KpoConfig(process_var=1.0, clip=False, ratio_log_max=0.01)
    config = kpo_reference.config(0.2, 0.2, kpo)
    advantages = batch.adv.to(dtype)
    gradients = []
    for adv in (advantages, advantages.float()):
        new = batch.new.detach().requires_grad_()
        compute_policy_loss(batch.old, new, adv, batch.mask, "token-mean", config)[0].backward()
        gradients.append(new.grad)
        new.grad = None
    assert (gradients[0][batch.mask] == 0).any()
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=0)


def test_metrics_count_what_they_say(kpo_reference):
    batch, kpo = kpo_reference.batch(rows=4, width=97, seed=11), KpoConfig(process_var=1e-2)
    low, high = 0.01, 0.02
    _, metrics = compute_policy_loss(
        batch.old, batch.new, batch.adv, batch.mask, "token-mean", kpo_reference.config(low, high, kpo)
    )
    mask = batch.mask
    raw = torch.where(mask, batch.new.double() - batch.old.double(), 0.0)
    filtered, _ = kpo_reference.filter(raw, mask, 1e-2, 1.0, 0.0)
    adv = torch.where(mask, batch.adv.double(), 0.0)

    def clipped(log_ratio):
        return mask & (((adv > 0) & (log_ratio.exp() > 1 + high)) | ((adv < 0) & (log_ratio.exp() < 1 - low)))

    def switch(log_ratio):
        different, neighbors = clipped(log_ratio)[:, 1:] != clipped(log_ratio)[:, :-1], mask[:, 1:] & mask[:, :-1]
        return ((different & neighbors).sum() / neighbors.sum()).item()

    gain, var = [], 0.0
    for _ in range(97):
        var += 1e-2
        gain.append(var / (var + 1.0))
        var *= 1 - gain[-1]
    expected = {
        "actor/pg_clipfrac": (clipped(filtered).sum() / mask.sum()).item(),
        "actor/pg_clipfrac_lower": 0.0,
        "actor/ppo_kl": -raw[mask].mean().item(),
        "actor/kpo_ratio_std_raw": raw[mask].exp().std(correction=0).item(),
        "actor/kpo_ratio_std_filtered": filtered[mask].exp().std(correction=0).item(),
        "actor/kpo_ratio_max_raw": raw[mask].max().exp().item(),
        "actor/kpo_logratio_abs_mean_raw": raw[mask].abs().mean().item(),
        "actor/kpo_logratio_abs_mean_filtered": filtered[mask].abs().mean().item(),
        "actor/kpo_gain_last": sum(gain[int(n) - 1] for n in mask.sum(1)) / 4,
        "actor/kpo_measurement_var": 1.0,
        "actor/kpo_innovation_clipfrac": 0.0,
        "actor/kpo_switch_raw": switch(raw),
        "actor/kpo_switch_filtered": switch(filtered),
    }
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-8)
    assert metrics["actor/kpo_switch_filtered"] < metrics["actor/kpo_switch_raw"]


def test_metric_names_are_reduced_as_meant():
    """verl takes the maximum of keys that contain max, the minimum of those that contain min, the sum of sum, total."""
    assert [key for key in KEYS if "max" in key] == ["actor/kpo_ratio_max_raw"]
    assert not [key for key in KEYS if any(word in key for word in ("min", "sum", "total"))]


@pytest.mark.parametrize("mode", MODES)
def test_nothing_observed(kpo_reference, mode):
    batch = kpo_reference.batch(seed=12)
    batch.mask[:] = False
    new = batch.new.clone().requires_grad_()
    loss, metrics = compute_policy_loss(batch.old, new, batch.adv, batch.mask, mode, kpo_reference.config())
    loss.backward()
    assert loss.item() == 0.0
    assert (new.grad == 0).all()
    assert set(metrics) == KEYS
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("name", ["log_prob", "old_log_prob"])
@pytest.mark.parametrize(
    "kpo",
    [KpoConfig(), KpoConfig(measurement_var="batch"), KpoConfig(gain="steady", innovation_clip=1.0, clip=False)],
    ids=["published", "measured", "saturated"],
)
def test_a_log_prob_that_is_not_finite_is_named_where_it_is_observed(kpo_reference, kpo, name, value):
    batch = kpo_reference.batch(rows=3, width=40, seed=14)
    batch.mask[1, 17], batch.mask[2, 5] = True, False
    tensors = {"log_prob": batch.new.clone(), "old_log_prob": batch.old.clone()}
    tensors[name][2, 5] = value
    rest = {"advantages": batch.adv, "response_mask": batch.mask, "config": kpo_reference.config(kpo=kpo)}
    assert compute_policy_loss(**tensors, **rest)[0].isfinite()  # not where it is masked
    tensors[name][1, 17] = value
    with pytest.raises(ValueError, match=rf"kpo got {name}=\[{value}\] at the observed \(row, token\) \[\[1, 17\]\]: "):
        compute_policy_loss(**tensors, **rest)


def test_padding_changes_nothing(kpo_reference):
    batch, kpo = kpo_reference.batch(seed=13), KpoConfig(process_var=1e-2)
    config = kpo_reference.config(kpo=kpo)
    loss, metrics = compute_policy_loss(batch.old, batch.new, batch.adv, batch.mask, "seq-mean-token-mean", config)

    def wide(tensor, value):
        return torch.nn.functional.pad(tensor, (9, 14, 0, 2), value=value)

    nan = float("nan")
    padded = compute_policy_loss(
        wide(batch.old, nan), wide(batch.new, 0.0), wide(batch.adv, nan), wide(batch.mask, False),
        "seq-mean-token-mean", config,
    )  # fmt: skip
    torch.testing.assert_close(padded[0], loss, rtol=1e-6, atol=1e-8)
    assert padded[1] == pytest.approx(metrics, rel=1e-5, abs=1e-9)


def test_unknown_aggregation_is_named(kpo_reference):
    batch = kpo_reference.batch()
    with pytest.raises(ValueError, match="seq-median"):
        compute_policy_loss(batch.old, batch.new, batch.adv, batch.mask, "seq-median", kpo_reference.config())


def test_the_spread_of_tiny_filtered_ratios_is_measured(kpo_reference):
    """Sixteen tokens at the published Q: filtered ratios differ from 1 by less than float32 can hold at 1."""
    batch = kpo_reference.batch(rows=4, width=16, seed=12)
    mask = torch.ones_like(batch.mask)
    old = batch.old.nan_to_num(0.0, 0.0, 0.0)
    new = old + 1e-3 * torch.randn(old.shape, generator=torch.Generator().manual_seed(12))
    _, metrics = compute_policy_loss(old, new, torch.ones_like(old), mask, "token-mean", kpo_reference.config())
    filtered, _ = kpo_reference.filter(new.double() - old.double(), mask, 1e-6, 1.0, 0.0)
    assert 0 < metrics["actor/kpo_ratio_std_filtered"] < 1e-7
    assert metrics["actor/kpo_ratio_std_filtered"] == pytest.approx(filtered.expm1().std(correction=0).item(), rel=1e-3)
