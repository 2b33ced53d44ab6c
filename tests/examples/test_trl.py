"""The TRL examples train the tiny model for real, on the CPU (scripts/test_core.sh, nightly)."""

from statistics import mean

import pytest

pytest.importorskip("trl")

import torch
import trl_sums
from trl_grpo import KpoTrainer, KrpoTrainer

from verl_krpo import KpoConfig, krpo_adaptive, score_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trl")


def test_krpo_adaptive_learns_sums(folder):
    rewards = trl_sums.train(folder, 40)
    assert mean(rewards[-10:]) > mean(rewards[:10]) + 0.1


def test_kpo_learns_sums_and_the_advantages_are_the_weighted_ones(folder):
    """Two updates a batch, so that log-ratios are not 0 and TRL itself computes the old log-probs."""
    batches = []

    class Trainer(KpoTrainer):
        settings = KpoConfig(process_var=1e-3)  # the published 1e-6 does nothing in answers this short

        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            batches.append((self._rewards[:, 0], batch))
            return batch

    assert issubclass(Trainer, KrpoTrainer)
    rewards = trl_sums.train(folder, 40, Trainer, num_iterations=2, epsilon=0.02, epsilon_high=0.03, loss_type="grpo")
    assert mean(rewards[-10:]) > mean(rewards[:10]) + 0.1
    assert len(batches) == 20
    for given, batch in batches:
        weights = score_weights(batch["old_per_token_logps"], batch["completion_mask"], "seq-mean-token-mean")
        exact = krpo_adaptive(given, torch.arange(16).repeat_interleave(8), weights=weights).advantages()
        torch.testing.assert_close(batch["advantages"], exact.float())
