"""The estimator against loops and dense linear algebra, what it must not depend on, and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_krpo import krpo
from verl_krpo.advantage import settings_of
from verl_krpo.advantage.groups import group
from verl_krpo.config import Baseline, KrpoConfig, Order, Scale
from verl_krpo.plugin.estimator import compute_advantage

NOISE = [(0.0, 1e-2), (1e-8, 1e-3), (1e-5, 1e-2), (1e-3, 10.0), (1.0, 1.0), (1.0, 1e-3), (0.0, 10.0)]
PRIORS = [(0.0, 1.0), (0.7, 0.05)]


def places(uids, order):
    """Rows of every group in the order in which they are filtered."""
    groups = group(np.array(uids, dtype=object), torch.ones(len(uids), dtype=torch.bool), order)
    return {label: groups.rows[groups.mask.nonzero()[:, 0] == k].tolist() for k, label in enumerate(groups.labels)}


@pytest.mark.parametrize("kind", ["normal", "binary"])
def test_arrival_is_the_published_formula(oracle, kind):
    rng = np.random.default_rng(0)
    for _ in range(10):
        rewards, uids = oracle.random_groups(rng, 12, 64, kind)
        found = oracle.advantage_of(rewards, uids, order="arrival")
        np.testing.assert_allclose(found, oracle.published(rewards, uids), rtol=1e-6)


def test_published_numbers_in_float32(oracle):
    """verl's own dtypes: float32 in, float32 out, within float32 rounding of the published loop."""
    rewards, uids = [1.0, 0.5, 0.0, 1.0, 0.01], ["a", "b", "a", "a", "b"]
    batch = oracle.batch(rewards, uids, order="arrival")
    batch["token_level_rewards"] = batch["token_level_rewards"].float()
    advantages, _ = compute_advantage(**batch)
    assert advantages.dtype == torch.float32
    exact = oracle.published(np.float32(rewards).astype(float), uids)
    np.testing.assert_allclose(advantages[:, 0], exact, rtol=1e-6)


@pytest.mark.parametrize("scale", Scale)
@pytest.mark.parametrize("baseline", Baseline)
def test_every_form_is_the_joint_gaussian_conditional(oracle, baseline, scale):
    rng = np.random.default_rng(1)
    for process_var, measurement_var in NOISE:
        for init_mean, init_var in PRIORS:
            noise = dict(
                process_var=process_var, measurement_var=measurement_var, init_mean=init_mean, init_var=init_var
            )
            for order in Order:
                rewards, uids = oracle.random_groups(rng, 5, 17)
                found = oracle.advantage_of(rewards, uids, baseline=baseline, scale=scale, order=order, **noise)
                for rows in places(uids, order).values():
                    exact = oracle.advantage_of_group(rewards[rows], baseline.value, scale.value, **noise)
                    np.testing.assert_allclose(found[rows], exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("baseline", [b for b in Baseline if b != Baseline.posterior])
def test_baselines_agree_with_statsmodels(oracle, baseline):
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    process_var, measurement_var, init_mean, init_var = 0.04, 0.3, 0.5, 0.8
    rng = np.random.default_rng(2)
    rewards = rng.normal(size=9)

    def run(observed):
        model = UnobservedComponents(observed, "llevel")
        # The prior is on x_0; statsmodels wants the first prediction.
        model.initialize_known(np.array([init_mean]), np.array([[init_var + process_var]]))
        return model.smooth([measurement_var, process_var])

    whole = run(rewards)
    if baseline == Baseline.leave_one_out:
        mean = []
        for i in range(len(rewards)):
            without = rewards.copy()
            without[i] = np.nan
            mean.append(run(without).smoothed_state[0, i])
    else:
        mean = {
            Baseline.causal: whole.filtered_state[0],
            Baseline.predicted: whole.predicted_state[0, :-1],
            Baseline.smoothed: whole.smoothed_state[0],
        }[baseline]
    found = oracle.advantage_of(
        rewards,
        ["a"] * 9,
        order="arrival",
        baseline=baseline,
        scale="none",
        process_var=process_var,
        measurement_var=measurement_var,
        init_mean=init_mean,
        init_var=init_var,
    )
    np.testing.assert_allclose(found, rewards - mean, rtol=1e-6, atol=1e-9)


# What it must not depend on

small_reward = st.sampled_from([0.0, 0.01, 0.5, 1.0]) | st.integers(-64, 64).map(lambda k: k / 16)
groups_of_rewards = st.lists(st.lists(small_reward, min_size=1, max_size=7), min_size=1, max_size=6)
forms = st.fixed_dictionaries(
    dict(
        process_var=st.sampled_from([1e-5, 0.1]),
        measurement_var=st.sampled_from([1e-2, 1.0]),
        init_mean=st.sampled_from([0.0, 0.4]),
        init_var=st.sampled_from([1.0, 0.05]),
        baseline=st.sampled_from([b.value for b in Baseline]),
        scale=st.sampled_from([s.value for s in Scale]),
        order=st.sampled_from([o.value for o in Order]),
    )
)


def rows_of(by_group):
    return [(f"uid-{k}", reward) for k, rewards in enumerate(by_group) for reward in rewards]


@settings(max_examples=60)
@given(groups_of_rewards, forms, st.randoms())
def test_interleaving_the_groups_changes_nothing(oracle, by_group, form, random):
    rows = rows_of(by_group)
    plain = oracle.advantage_of([r for _, r in rows], [u for u, _ in rows], **form)
    turns = [u for u, _ in rows]
    random.shuffle(turns)
    left = {f"uid-{k}": list(np.flatnonzero([u == f"uid-{k}" for u, _ in rows])) for k in range(len(by_group))}
    taken = [left[u].pop(0) for u in turns]
    mixed = oracle.advantage_of([rows[i][1] for i in taken], turns, **form)
    np.testing.assert_allclose(mixed, plain[taken], rtol=1e-9, atol=1e-9)


@settings(max_examples=60)
@given(
    groups_of_rewards,
    st.sampled_from(["posterior", "smoothed", "leave_one_out"]),
    st.sampled_from([s.value for s in Scale]),
    st.sampled_from(["shuffled", "arrival"]),
    st.booleans(),
    st.randoms(),
)
def test_order_free_forms_ignore_the_order_within_a_group(oracle, by_group, baseline, scale, order, adaptive, random):
    form = (
        dict(name="krpo_adaptive") if adaptive else dict(process_var=0.0, baseline=baseline, scale=scale, order=order)
    )
    rows = rows_of(by_group)
    plain = oracle.advantage_of([r for _, r in rows], [u for u, _ in rows], **form)
    taken = list(range(len(rows)))
    random.shuffle(taken)
    mixed = oracle.advantage_of([rows[i][1] for i in taken], [rows[i][0] for i in taken], **form)
    np.testing.assert_allclose(mixed, plain[taken], rtol=1e-9, atol=1e-9)


def test_weights_are_noises_of_their_own(oracle):
    """Every form against the joint Gaussian with R / w_i; weights count in units of their mean."""
    rng = np.random.default_rng(7)
    noise = dict(process_var=0.02, measurement_var=0.4, init_mean=0.3, init_var=0.8)
    rewards, uids = oracle.random_groups(rng, 6, 7)
    weights = rng.exponential(size=len(rewards))
    for baseline in Baseline:
        settings = KrpoConfig(**noise, baseline=baseline, scale="none", order="arrival")
        estimate = krpo(torch.tensor(rewards), uids, settings, 5.0 * torch.tensor(weights))
        for rows in places(uids, Order.arrival).values():
            own = noise | dict(measurement_var=0.4 / (weights[rows] / weights.mean()))
            mean, _ = oracle.dense(rewards[rows], baseline.value, *own.values())
            np.testing.assert_allclose(estimate.advantages()[rows], rewards[rows] - mean, rtol=1e-9, atol=1e-9)


def test_a_diffuse_prior_makes_the_group_mean_and_rloo(oracle):
    rng = np.random.default_rng(4)
    rewards, uids = oracle.random_groups(rng, 6, 8)
    rewards, uids = np.append(rewards, rng.normal(size=12)), uids + [f"uid-{k}" for k in range(6) for _ in range(2)]
    form = dict(process_var=0.0, init_var=1e12, scale="none")
    for baseline in ("posterior", "leave_one_out"):
        found = oracle.advantage_of(rewards, uids, baseline=baseline, **form)
        for rows in places(uids, Order.arrival).values():
            r, n = rewards[rows], len(rows)
            exact = r - r.mean() if baseline == "posterior" else (r - r.mean()) * n / (n - 1)
            np.testing.assert_allclose(found[rows], exact, rtol=1e-6, atol=1e-9)


def test_unbiased_forms_do_not_read_their_own_reward(oracle):
    rng = np.random.default_rng(5)
    rewards, uids = oracle.random_groups(rng, 5, 6)
    for form in (
        dict(baseline="predicted", scale="none"),
        dict(baseline="leave_one_out", scale="none"),
        dict(name="jspo"),
        dict(name="krpo_adaptive", scale="none"),
    ):
        baseline = rewards - oracle.advantage_of(rewards, uids, **form)
        for row in range(len(rewards)):
            other = rewards.copy()
            other[row] += 3.0
            changed = other - oracle.advantage_of(other, uids, **form)
            np.testing.assert_allclose(changed[row], baseline[row], rtol=1e-9, atol=1e-9)


# What lies under the mask, and odd batches


def test_padding_and_rejected_rows_get_zero_and_change_nobody(oracle):
    rng = np.random.default_rng(6)
    rewards, uids = oracle.random_groups(rng, 5, 6)
    n = len(rewards)
    extra = np.array([0.0, 0.0, np.nan, 1e6])
    for form in ({}, dict(name="krpo_adaptive"), dict(name="jspo"), dict(baseline="smoothed", process_var=0.1)):
        plain = oracle.advantage_of(rewards, uids, **form)
        batch = oracle.batch(
            np.append(rewards, extra), uids + ["pad-1", "pad-1", uids[0], uids[1]], masked=range(n, n + 4), **form
        )
        found, _ = compute_advantage(**batch)
        np.testing.assert_allclose(found[:n, 0], plain, rtol=1e-12)
        assert (found[n:] == 0).all()


def test_a_batch_of_padding_alone(oracle):
    for form in ({}, dict(name="krpo_adaptive"), dict(name="jspo")):
        found, _ = compute_advantage(**oracle.batch([0.0, 0.0], ["pad", "pad"], masked=[0, 1], **form))
        assert (found == 0).all()


def test_a_reward_on_a_masked_last_token_counts(oracle):
    batch = oracle.batch([1.0, 0.0, 1.0], "aab", order="arrival")
    plain, _ = compute_advantage(**batch)
    batch["response_mask"][:, -1] = 0
    found, _ = compute_advantage(**batch)
    assert torch.equal(found[:, :-1], plain[:, :-1]) and (found[:, -1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_any_mask_dtype_and_no_write_into_the_arguments(oracle, dtype):
    batch = oracle.batch([1.0, 0.0, 1.0, 0.5], "abab")
    plain, _ = compute_advantage(**batch)
    batch["response_mask"] = batch["response_mask"].to(dtype)
    before = {key: batch[key].clone() for key in ("token_level_rewards", "response_mask")}
    found, _ = compute_advantage(**batch, reward_baselines=None)
    assert torch.equal(found, plain)
    assert all(torch.equal(batch[key], value) for key, value in before.items())


def test_a_list_of_rewards_is_not_rounded():
    rewards = [0.1, 0.2, 0.4, 0.7]
    exact = krpo(torch.tensor(rewards, dtype=torch.float64), ["a"] * 4).advantages()
    assert torch.equal(krpo(rewards, ["a"] * 4).advantages(), exact)


def test_low_precision_rewards_come_out_as_float32(oracle):
    batch = oracle.batch([1.0, 0.0, 1.0], "aab")
    plain, _ = compute_advantage(**batch)
    found, _ = compute_advantage(**batch | dict(token_level_rewards=batch["token_level_rewards"].bfloat16()))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), plain, rtol=1e-6, atol=0)


def test_a_group_of_one_follows_its_forms_formula(oracle):
    std = np.sqrt(1.0 + 1e-5)
    gain = std**2 / (std**2 + 1e-2)
    for form, exact in (
        (dict(baseline="causal", scale="none"), 1 - gain),
        (dict(baseline="predicted", scale="filter_std"), 1 / (std + 1e-8)),
        (dict(baseline="leave_one_out", scale="filter_std"), 1 / (std + 1e-8)),
        (dict(baseline="leave_one_out", scale="group_std"), 1.0),
    ):
        assert oracle.advantage_of([1.0], ["a"], **form) == pytest.approx([exact], rel=1e-9)


def test_group_std_of_equal_rewards_divides_by_one(oracle):
    found = oracle.advantage_of([1.0, 1.0, 0.1], "aab", baseline="predicted", scale="group_std", order="arrival")
    exact = oracle.advantage_of([1.0, 1.0, 0.1], "aab", baseline="predicted", scale="none", order="arrival")
    np.testing.assert_array_equal(found, exact)


def test_the_pure_function_by_rows(oracle):
    """Plain lists and plain words; rows by prompt in any order, what is not counted gets 0."""
    rewards, prompts = [1.0, 0.0, 1.0, 0.5], ["a", "b", "a", "b"]
    estimate = krpo(rewards, prompts, KrpoConfig(order="arrival"))
    np.testing.assert_allclose(estimate.advantages().numpy(), oracle.published(rewards, prompts), rtol=1e-12)
    counted = torch.tensor([True, True, False, True])
    without = krpo(rewards, prompts, KrpoConfig(order="arrival"), counted=counted).advantages()
    assert without[2] == 0 and without[0] == estimate.advantages()[0]
    assert krpo([], []).advantages().shape == (0,)


# Settings and errors


def test_config_may_be_anything_that_verl_passes(oracle):
    pytest.importorskip("verl")
    from verl.trainer.config import AlgoConfig

    batch = oracle.batch([1.0, 0.0, 1.0], "aab")
    plain, _ = compute_advantage(**batch)
    struct = OmegaConf.create({"adv_estimator": "krpo", "krpo": OmegaConf.structured(KrpoConfig)})
    OmegaConf.set_struct(struct, True)
    bare = OmegaConf.create({"adv_estimator": "krpo"})
    OmegaConf.set_struct(bare, True)
    for config in (None, {}, bare, struct, AlgoConfig()):
        found, _ = compute_advantage(**batch | dict(config=config))
        assert torch.equal(found, plain)
    changed = OmegaConf.create({"krpo": {"init_var": 0.5}})
    assert not torch.equal(compute_advantage(**batch | dict(config=changed))[0], plain)
    reference = OmegaConf.create({"data": {"p": 0.5}, "algorithm": {"krpo": {"init_var": "${data.p}"}}}).algorithm
    assert settings_of("krpo", reference) == settings_of("krpo", changed)
    changed.krpo.init_var = 1.0
    assert torch.equal(compute_advantage(**batch | dict(config=changed))[0], plain)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"typo": 1}, "algorithm.krpo.typo"),
        ({"baseline": "mean"}, "algorithm.krpo.baseline"),
        ({"scale": "std"}, "algorithm.krpo.scale"),
        ({"order": "random"}, "algorithm.krpo.order"),
        ({"process_var": -1e-5}, "algorithm.krpo.process_var"),
        ({"measurement_var": 0}, "algorithm.krpo.measurement_var"),
        ({"init_var": -1}, "algorithm.krpo.init_var"),
        ({"baseline": "jspo"}, "since 0.3 jspo is an estimator of its own: algorithm.adv_estimator=jspo"),
        ({"memory": "prompt"}, r"since 0.3 the memory is an estimator of its own: \+algorithm=krpo_memory"),
        ({"init_mean": "batch"}, "since 0.3 what a batch estimates .* algorithm.adv_estimator=krpo_adaptive"),
        ({"process_var": 0, "init_var": 0}, "algorithm.krpo.scale=filter_std.*init_var=0"),
    ],
)
def test_a_wrong_setting_is_named(oracle, node, message):
    batch = oracle.batch([1.0, 0.0], "aa") | dict(config={"krpo": node})
    with pytest.raises(ValueError, match=message):
        compute_advantage(**batch)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rewards_that_are_not_finite_are_named(oracle, bad):
    with pytest.raises(ValueError, match=r"rows \[3\] of prompts \['b'\]"):
        compute_advantage(**oracle.batch([1.0, 0.0, 1.0, bad], "aabb"))


def test_a_missing_index_is_an_error(oracle):
    with pytest.raises(ValueError, match="index=None"):
        compute_advantage(**oracle.batch([1.0, 0.0], "aa") | dict(index=None))


def test_verls_own_entry_point_reaches_it(oracle):
    pytest.importorskip("verl")
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    batch = oracle.batch([1.0, 0.0, 1.0], "aab", order="arrival")
    data = DataProto.from_dict(
        tensors={key: batch[key] for key in ("token_level_rewards", "response_mask")},
        non_tensors={"uid": batch["index"]},
    )
    data = compute_advantage(data, adv_estimator="krpo", config=OmegaConf.create(batch["config"]))
    np.testing.assert_allclose(data.batch["advantages"][:, 0], oracle.published([1.0, 0.0, 1.0], "aab"), rtol=1e-6)


def test_a_division_by_zero_is_refused_on_the_driver(compose):
    from verl_krpo.plugin import guards

    with pytest.raises(ValueError, match="algorithm.krpo.scale=filter_std.*init_var=0"):
        guards.check(compose("+algorithm=krpo", "algorithm.krpo.process_var=0", "algorithm.krpo.init_var=0"))
