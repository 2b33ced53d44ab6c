"""verl's policy loss config with the kpo keys: what Hydra instantiates, imported only then."""

from dataclasses import dataclass, field

from verl.workers.config import PolicyLossConfig

from verl_krpo.config import KpoConfig


@dataclass
class KpoPolicyLossConfig(PolicyLossConfig):
    """`actor_rollout_ref.actor.policy_loss` of a job that selects `+actor@actor_rollout_ref.actor.policy_loss=kpo`."""

    loss_mode: str = "kpo"
    kpo: KpoConfig = field(default_factory=KpoConfig)
