"""Log-probs to token losses: every loss a function in a file of its name."""

from verl_krpo.config import KpoConfig

# By the name of policy_loss.loss_mode, of the config group, and of its node in `policy_loss`.
LOSSES = {"kpo": KpoConfig}
