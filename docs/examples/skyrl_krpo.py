"""SkyRL: `krpo_adaptive` as its advantage estimator, `kpo` as its policy loss.

    python skyrl_krpo.py trainer.algorithm.advantage_estimator=krpo_adaptive trainer.algorithm.policy_loss_type=kpo \
        trainer.algorithm.eps_clip_low=3e-4 trainer.algorithm.eps_clip_high=4e-4 ...

Checked with SkyRL 0.4.0. SkyRL gives its estimators no log-probs, so rewards weigh alike here.
"""

import re
import sys

import torch

from verl_krpo import kpo, krpo_adaptive


def krpo_estimator(token_level_rewards, response_mask, index, **_):
    """(advantages, returns), (rows, tokens), of rewards and a mask (rows, tokens) and the prompts' ids (rows,)."""
    # SkyRL fills a batch up with copies of its first row, of prompts pad0, pad1, ...: no prompt learns from those.
    counted = torch.tensor([re.fullmatch(r"pad\d+", str(uid)) is None for uid in index])
    estimate = krpo_adaptive(token_level_rewards.sum(dim=1), list(index), counted=counted)
    advantages = estimate.advantages().to(token_level_rewards)[:, None] * response_mask
    return advantages, advantages


def kpo_loss(log_probs, old_log_probs, advantages, config, loss_mask=None, rollout_logprobs=None):
    """(loss, metrics) of (rows, tokens): a sum, since SkyRL puts what it divides by into the advantages."""
    mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
    clip = dict(clip_low=config.eps_clip_low, clip_high=config.eps_clip_high)
    losses, diagnostics = kpo(log_probs, old_log_probs, advantages, mask, **clip)
    return losses.sum(), {"clip_ratio": diagnostics["pg_clipfrac"], **diagnostics}


def register():
    from skyrl.backends.skyrl_train.utils.ppo_utils import AdvantageEstimatorRegistry, PolicyLossRegistry

    AdvantageEstimatorRegistry.register("krpo_adaptive", krpo_estimator)
    PolicyLossRegistry.register("kpo", kpo_loss)


def main():
    import ray
    from skyrl.backends.skyrl_train.utils.off_policy_correction_utils import off_policy_correction_enabled
    from skyrl.train.config import SkyRLTrainConfig
    from skyrl.train.entrypoints.main_base import skyrl_entrypoint, validate_cfg
    from skyrl.train.utils import initialize_ray

    register()  # before Ray starts: then every process gets them
    config = SkyRLTrainConfig.from_cli_overrides(sys.argv[1:])
    algorithm = config.trainer.algorithm
    if algorithm.policy_loss_type == "kpo" and off_policy_correction_enabled(algorithm.off_policy_correction):
        raise ValueError("kpo_loss corrects nothing: trainer.algorithm.off_policy_correction has to stay off")
    validate_cfg(config)
    initialize_ray(config)
    ray.get(skyrl_entrypoint.remote(config))


if __name__ == "__main__":
    main()
