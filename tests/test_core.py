"""The core where verl is not: with torch and numpy alone."""

import subprocess
import sys

WITHOUT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"verl", "hydra", "ray", "pandas", "omegaconf", "tensordict", "transformers"}:
            raise ModuleNotFoundError(f"there is no {name} here")

sys.meta_path.insert(0, Refuse())
"""
CODE = """
import torch
import verl_krpo
from verl_krpo import AdaptiveConfig, KpoConfig, KrpoConfig, LocalLevel, MemoryConfig, PromptMemory

rewards, prompts = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.5]), ["a", "a", "b", "b", "c", "c"]
log_prob, mask = -torch.rand(6, 5), torch.ones(6, 5)
weights = verl_krpo.score_weights(log_prob, mask)
memory = PromptMemory()
for estimate in (
    verl_krpo.krpo(rewards, prompts, KrpoConfig(baseline="leave_one_out")),
    verl_krpo.krpo_adaptive(rewards, prompts, AdaptiveConfig(scale="none"), weights),
    verl_krpo.krpo_memory(rewards, prompts, memory, MemoryConfig(), weights)[0],
    verl_krpo.jspo(rewards, prompts),
):
    assert estimate.advantages().isfinite().all()
old = log_prob - 0.1
losses, _ = verl_krpo.kpo(
    log_prob.requires_grad_(), old, torch.ones(6, 5), mask.bool(), KpoConfig(), clip_low=0.1, clip_high=0.2
)
losses.sum().backward()
assert log_prob.grad.any()
assert verl_krpo.kalman.leave_one_out(torch.rand(2, 3), None, LocalLevel(0.0, 1.0, init_var=1.0)).mean.shape == (2, 3)
print(sorted(name for name in ("verl", "hydra", "ray", "pandas", "omegaconf") if name in sys.modules))
"""


def test_the_core_runs_with_torch_and_numpy_alone():
    done = subprocess.run([sys.executable, "-c", WITHOUT + CODE], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stderr
