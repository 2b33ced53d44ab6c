"""The loss as verl calls it: through its config, its registry and its ppo_loss on jagged micro-batches."""

import pickle

import pytest
import torch

pytest.importorskip("verl")

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from tensordict import TensorDict

from verl_krpo.config import Gain, KpoConfig
from verl_krpo.plugin.loss import settings_of

KPO = "+actor@actor_rollout_ref.actor.policy_loss=kpo"
AT = "actor_rollout_ref.actor"
MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]


def composed(*overrides):
    import verl  # noqa: F401 - loads the plugin

    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(
            "ppo_trainer",
            overrides=[f"{AT}.ppo_micro_batch_size_per_gpu=4", f"{AT}.policy_loss.loss_mode=kpo", *overrides],
        )


def actor(*overrides):
    from verl.utils.config import omega_conf_to_dataclass

    return omega_conf_to_dataclass(composed(*overrides).actor_rollout_ref.actor)


SET = [KPO, f"{AT}.policy_loss.kpo.gain=steady", f"{AT}.policy_loss.kpo.measurement_var=batch"]
SET += [f"{AT}.policy_loss.kpo.innovation_clip=3"]
IS = KpoConfig(measurement_var="batch", gain=Gain.steady, innovation_clip=3.0)
ROADS = {
    "as composed": lambda config: config,
    "pickled, as Ray does": lambda config: pickle.loads(pickle.dumps(config)),
    "through a container": lambda config: OmegaConf.create(OmegaConf.to_container(config, resolve=True)),
    "through yaml": lambda config: OmegaConf.create(OmegaConf.to_yaml(config, resolve=True)),
}


@pytest.mark.parametrize("road", ROADS)
def test_the_typed_config_reaches_the_worker(road):
    from verl.utils.config import omega_conf_to_dataclass

    config = ROADS[road](composed(*SET).actor_rollout_ref.actor)
    instance = pickle.loads(pickle.dumps(omega_conf_to_dataclass(config)))
    assert instance.policy_loss.loss_mode == "kpo"
    assert settings_of(instance) == IS


def test_one_key_alone_means_the_published_defaults():
    assert settings_of(actor()) == KpoConfig()


@pytest.mark.parametrize("node", [{"process_var": 1e-4}, OmegaConf.create({"process_var": 1e-4})])
def test_a_plain_node_is_typed(kpo_reference, node):
    assert settings_of(kpo_reference.config(kpo=node)) == KpoConfig(process_var=1e-4)


@pytest.mark.parametrize(
    "node, names", [({"typo": 1}, "typo"), ({"gain": "fast"}, "gain"), ({"process_var": -1.0}, "process_var")]
)
def test_a_wrong_node_is_named(kpo_reference, node, names):
    with pytest.raises(ValueError, match=names):
        settings_of(kpo_reference.config(kpo=node))


def rows_of_very_different_lengths(seed=0):
    make = torch.Generator().manual_seed(seed)
    rows = []
    for prompt, response in ((3, 1), (2, 57), (5, 8), (1, 301), (4, 2), (7, 90)):
        old = -torch.rand(response, generator=make)
        mask = torch.rand(response, generator=make) > 0.25
        mask[0] = True
        rows.append(
            dict(
                prompts=torch.ones(prompt, dtype=torch.long),
                responses=torch.ones(response, dtype=torch.long),
                old_log_probs=old,
                new=torch.cat(
                    [torch.zeros(prompt - 1), old + 0.3 * torch.randn(response, generator=make), torch.zeros(1)]
                ),
                advantages=torch.randn((), generator=make).expand(response).clone(),
                response_mask=mask.long(),
                rollout_is_weights=torch.rand(response, generator=make) + 0.5,
                ref_log_prob=old - 0.1,
            )
        )
    rows[4]["response_mask"][:] = 0  # a padded row
    return rows


def run(config, rows, tokens, sequences):
    """Loss, gradient per row and metrics of one micro-batch through verl's own ppo_loss."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.losses import ppo_loss

    def jagged(key):
        return torch.nested.as_nested_tensor([row[key] for row in rows], layout=torch.jagged)

    fields = {key: jagged(key) for key in rows[0] if key != "new"}
    data = TensorDict(fields, batch_size=len(rows))
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=tokens, global_batch_size=sequences)
    leaf = torch.cat([row["new"] for row in rows]).requires_grad_()
    entropy = leaf * 0.5
    loss, metrics = ppo_loss(config, {"log_probs": leaf, "entropy": entropy}, data)
    loss.backward()
    return loss.detach(), leaf.grad.split([len(row["new"]) for row in rows]), metrics


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "extra", [[], [f"{AT}.policy_loss.kpo.innovation_clip=0.2", f"{AT}.policy_loss.kpo.clip=false"]]
)
def test_micro_batches_add_up(mode, extra):
    config = actor(
        KPO, f"{AT}.policy_loss.kpo.process_var=1e-2", f"{AT}.clip_ratio_low=1e-2", f"{AT}.clip_ratio_high=2e-2",
        f"{AT}.loss_agg_mode={mode}", f"{AT}.loss_scale_factor=300", f"{AT}.use_kl_loss=true",
        f"{AT}.entropy_coeff=0.01", *extra,
    )  # fmt: skip
    rows = rows_of_very_different_lengths()
    tokens = sum(int(row["response_mask"].sum()) for row in rows)
    whole, whole_grad, metrics = run(config, rows, tokens, len(rows))
    for split in ([[0, 1, 2, 3, 4, 5]], [[5, 4], [3], [2, 1, 0]], [[i] for i in range(6)]):
        parts = [(part, run(config, [rows[i] for i in part], tokens, len(rows))) for part in split]
        torch.testing.assert_close(sum(out[0] for _, out in parts), whole, rtol=2e-6, atol=1e-7)
        for part, (_, grads, names) in parts:
            assert set(names) == set(metrics)
            for i, grad in zip(part, grads, strict=True):
                torch.testing.assert_close(grad, whole_grad[i], rtol=2e-6, atol=1e-9)
    assert "actor/kpo_ratio_std_filtered" in metrics


@pytest.mark.parametrize("mode", MODES)
def test_without_global_counts_it_normalises_as_verl_does(kpo_reference, mode):
    """Same batch through verl's vanilla with equal log-probs: where no ratio is clipped both losses are -A ratio."""
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla

    from verl_krpo.plugin.loss import compute_policy_loss

    batch = kpo_reference.batch(seed=20)
    old = torch.where(batch.mask, batch.old, 0.0).double()
    adv = torch.where(batch.mask, batch.adv, 0.0).double()
    config = kpo_reference.config()
    ours, _ = compute_policy_loss(old, old, adv, batch.mask, mode, config)
    theirs, _ = compute_policy_loss_vanilla(old, old, adv, batch.mask, mode, config)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-8)


def test_across_ranks_the_global_counts_are_required(kpo_reference):
    from verl_krpo.plugin.loss import compute_policy_loss

    batch = kpo_reference.batch()
    with pytest.raises(ValueError, match="batch_num_tokens"):
        compute_policy_loss(batch.old, batch.new, batch.adv, batch.mask, "token-mean", kpo_reference.config(dp_size=2))
