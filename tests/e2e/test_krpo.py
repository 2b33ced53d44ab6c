import math

import pytest

pytestmark = pytest.mark.e2e

METRICS = {
    "krpo/baseline_mean",
    "krpo/gain_first",
    "krpo/gain_last",
    "krpo/advantage_std",
    "krpo/measurement_var",
    "krpo/prior_mean",
    "krpo/prior_var",
    "krpo/nis",
    "krpo/groups",
    "krpo/group_size_min",
    "krpo/singletons",
}


def test_one_key_trains_with_krpo_and_logs_its_metrics(verl_job):
    """A plain verl command line and one key: published defaults, and krpo/* beside verl's own metrics at every step."""
    job = verl_job(
        "algorithm.adv_estimator=krpo",
        "data.train_batch_size=8",
        "data.max_prompt_length=32",
        "data.max_response_length=16",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        "actor_rollout_ref.rollout.n=4",
        "trainer.logger=[console,file]",
        "trainer.total_training_steps=3",
        "trainer.test_freq=-1",
        "trainer.val_before_train=False",
    )
    assert len(job.steps()) == 3
    for metrics in job.steps():
        assert set(metrics) >= METRICS and math.isfinite(metrics["actor/pg_loss"])
        assert (metrics["krpo/groups"], metrics["krpo/group_size_min"], metrics["krpo/singletons"]) == (8, 4, 0)
        prior = metrics["krpo/measurement_var"], metrics["krpo/prior_mean"], metrics["krpo/prior_var"]
        assert prior == (1e-2, 0.0, 1.0)
        # K_1 of the published filter: (P0 + Q) / (P0 + Q + R).
        assert metrics["krpo/gain_first"] == pytest.approx(1.00001 / 1.01001)
        # verl's own view of the same advantages: a mean over tokens of what is constant along a response.
        assert abs(metrics["critic/advantages/max"]) < 100 and metrics["krpo/advantage_std"] > 0
