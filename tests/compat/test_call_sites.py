"""krpo and kpo where the installed verl calls them; scripts/test_compat.sh runs this with older versions too."""

import numpy as np
import pytest
import torch
from omegaconf import open_dict
from tensordict import TensorDict

ACTOR = "actor_rollout_ref.actor"
KEYS = [
    f"{ACTOR}.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.name=vllm",
]


def test_registered():
    import verl  # noqa: F401
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn

    assert get_adv_estimator_fn("krpo").__module__ == "verl_krpo.plugin.estimator"
    assert get_policy_loss_fn("kpo").__module__ == "verl_krpo.plugin.loss"


def test_the_estimator_at_its_call_site(compose):
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    from verl_krpo.advantage.krpo import krpo
    from verl_krpo.config import KrpoConfig

    config = compose(*KEYS, "+algorithm=krpo", "algorithm.krpo.process_var=1e-3").algorithm
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 0, 1, 1])
    tokens = torch.zeros(8, 5)
    tokens[:, -1] = rewards
    index = np.array(["a", "b"] * 4, dtype=object)
    data = DataProto.from_dict(
        tensors={"token_level_rewards": tokens, "response_mask": torch.ones(8, 5, dtype=torch.long)},
        non_tensors={"uid": index},
    )
    found = compute_advantage(data, adv_estimator="krpo", num_repeat=4, config=config).batch["advantages"]
    expected = krpo(rewards, index, KrpoConfig(process_var=1e-3)).advantages().float()
    torch.testing.assert_close(found, expected[:, None].expand(8, 5), rtol=1e-6, atol=0)


def test_the_loss_at_its_call_site(compose):
    from verl.utils import tensordict_utils as tu
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.utils.losses import ppo_loss

    from verl_krpo.plugin.loss import compute_policy_loss

    overrides = [f"+actor@{ACTOR}.policy_loss=kpo", f"{ACTOR}.policy_loss.kpo.process_var=1e-2"]
    config = omega_conf_to_dataclass(compose(*KEYS, *overrides).actor_rollout_ref.actor)
    rows, prompt, response = 4, 3, 6
    make = torch.Generator().manual_seed(0)
    old = -torch.rand(rows, response, generator=make)
    new = old + 0.3 * torch.randn(rows, response, generator=make)
    advantages = torch.randn(rows, 1, generator=make).expand(rows, response).contiguous()
    mask = torch.ones(rows, response, dtype=torch.long)

    def jagged(length):
        return torch.nested.as_nested_tensor([torch.ones(length, dtype=torch.long)] * rows, layout=torch.jagged)

    fields = {"prompts": jagged(prompt), "responses": jagged(response), "old_log_probs": old}
    fields |= {"advantages": advantages, "response_mask": mask, "attention_mask": torch.ones(rows, prompt + response)}
    data = TensorDict(fields, batch_size=rows)
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=rows * response, global_batch_size=rows)
    # One log-prob a token of prompt and response, each at the position before the token it belongs to.
    flat = torch.cat([torch.zeros(rows, prompt - 1), new, torch.zeros(rows, 1)], dim=1).flatten()
    values = torch.nested.as_nested_tensor(list(flat.view(rows, -1)), layout=torch.jagged)
    loss, metrics = ppo_loss(config, {"log_probs": values}, data)
    expected, _ = compute_policy_loss(old, new, advantages, mask.bool(), config.loss_agg_mode, config)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert any(key.startswith("actor/kpo_") for key in metrics)


@pytest.mark.parametrize("keys", [["+algorithm=krpo"], [f"+actor@{ACTOR}.policy_loss=kpo"]], ids=["krpo", "kpo"])
def test_a_typo_is_refused_when_the_job_is_composed(compose, keys):
    from hydra.errors import ConfigCompositionException

    node = "algorithm.krpo" if keys[0] == "+algorithm=krpo" else f"{ACTOR}.policy_loss.kpo"
    with pytest.raises(ConfigCompositionException, match="proces_var"):
        compose(*KEYS, *keys, f"{node}.proces_var=1")


def test_a_typo_is_refused_before_ray(compose):
    from verl.utils.config import validate_config

    config = compose(*KEYS, "algorithm.adv_estimator=krpo")
    with open_dict(config):
        config.algorithm.krpo = {"proces_var": 1}
    with pytest.raises(ValueError, match="algorithm.krpo.proces_var"):
        validate_config(config, use_reference_policy=False, use_critic=False)
