"""What is rolled out next: verl's own `_next_train_batch` on its own dataloader, without workers."""

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from verl_krpo import choice
from verl_krpo.advantage.memory import PromptMemory, krpo_memory
from verl_krpo.plugin import hooks, metrics, next_batch, prompt_memory
from verl_krpo.plugin.estimator import compute_advantage

N = 4
pytestmark = pytest.mark.usefixtures("no_run")


@pytest.fixture
def start(tmp_path):
    """start(**keys of algorithm.krpo_memory) -> verl's synchronous trainer with its dataloader and a memory."""
    from torchdata.stateful_dataloader import StatefulDataLoader
    from verl.trainer.ppo.utils import create_rl_sampler
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
    from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

    rows = [
        {"data_source": "s", "prompt": [{"role": "user", "content": f"{k}?"}], "extra_info": {"index": k}, "number": k}
        for k in range(64)
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")

    def started(prompts: int = 64, batch: int = 8, steps: int = 100, memory: PromptMemory | None = None, **keys):
        data = {"cache_dir": str(tmp_path), "prompt_key": "prompt", "filter_overlong_prompts": False}
        config = OmegaConf.create(
            {
                "algorithm": {"adv_estimator": "krpo_memory", "krpo_memory": keys},
                "data": data | {"train_batch_size": batch, "seed": 3, "shuffle": True},
                "actor_rollout_ref": {"actor": {"loss_agg_mode": "token-mean"}, "rollout": {"n": N}},
                "trainer": {"default_local_dir": str(tmp_path), "resume_mode": "disable"},
            }
        )
        trainer = object.__new__(PPOTrainerSync)
        dataset = RLHFDataset(str(tmp_path / "rows.parquet"), None, config.data, max_samples=prompts)
        trainer.config, trainer.global_steps, trainer.train_dataset = config, 0, dataset
        trainer.total_training_steps, trainer.train_dataloader_it = steps, None
        sampler = create_rl_sampler(config.data, dataset)
        trainer.train_dataloader = StatefulDataLoader(
            dataset, batch_size=batch, drop_last=True, collate_fn=collate_fn, sampler=sampler
        )
        hooks.begin(lambda trainer: None, trainer)
        trainer.global_steps = 1
        prompt_memory.run().memory = memory or PromptMemory()
        return trainer

    return started


def name(number: int) -> str:
    return prompt_memory.prompt_id([{"role": "user", "content": f"{number}?"}], "s", None)


def trained() -> PromptMemory:
    """After six visits of every prompt. One in three earns 0 or 1 by chance, the others always the same."""
    memory, rng = PromptMemory(), np.random.default_rng(0)
    p = np.array([(0.0, 0.5, 1.0)[k % 3] for k in range(64)]).repeat(N)
    names = np.repeat([name(k) for k in range(64)], N)
    for _ in range(6):
        _, memory = krpo_memory(torch.from_numpy((rng.random(len(p)) < p).astype(float)), names, memory)
    return memory


def numbers(batch) -> list[int]:
    return list(batch["number"])


def steps(trainer, count: int) -> list[list[int]]:
    """The prompts of the next steps."""
    found = []
    for _ in range(count):
        found.append(numbers(trainer._next_train_batch()))
        trainer.global_steps += 1
    return found


def test_a_job_that_does_not_choose_has_verls_own_batches(start):
    ours, none = start(), start()
    none.config.algorithm.adv_estimator = "krpo_adaptive"
    batch = ours._next_train_batch()
    assert numbers(batch) == numbers(none._next_train_batch())
    assert prompt_memory.WEIGHT not in batch.keys() and next_batch.RESPONSES not in batch.keys()
    assert not metrics.drain()


@pytest.mark.parametrize("objective", ["signal", "same"])
def test_the_prompts_that_teach_are_taken(start, objective):
    memory = trained()
    trainer = start(memory=memory, select="signal", objective=objective)
    trainer.global_steps = memory.step + 1
    for _ in range(6):
        batch = trainer._next_train_batch()
        assert len(set(numbers(batch))) == len(set(batch["uid"])) == 8
        assert batch["global_steps"] == trainer.global_steps and next_batch.RESPONSES not in batch.keys()
        trainer.global_steps += 1
    logged = metrics.drain()
    assert logged["krpo/candidates_new"] == 0 < logged["krpo/rollouts_saved"] < 1
    assert sum(number % 3 == 1 for number in numbers(batch)) > 8 / 3
    weights = np.array(batch[prompt_memory.WEIGHT])
    if objective == "signal":
        assert (weights == 1).all() and "krpo/effective_prompts" not in logged
    else:
        assert weights.min() < 1 < weights.max() and 1 <= logged["krpo/effective_prompts"] < 8


def test_new_prompts_are_taken_at_random(start):
    """All have the prior, so what comes is 8 of the 32 candidates; those not taken come again."""
    trainer = start(select="signal")
    first = [steps(trainer, 1)[0] for _ in range(2)]
    assert first[0] != first[1]
    seen = {number for batch in steps(trainer, 60) for number in batch}
    assert seen == set(range(64))


def test_choices_follow_from_seed_and_step_and_go_on_after_a_restart(start):
    memory = trained()
    whole = start(memory=memory, select="signal", allocate="signal", objective="same")
    whole.global_steps = memory.step + 1
    before, state = steps(whole, 3), whole.train_dataloader.state_dict()
    after = [whole._next_train_batch(8) for _ in range(2)]  # two fetches of one step differ
    assert numbers(after[0]) != numbers(after[1])

    again = start(memory=memory, select="signal", allocate="signal", objective="same")
    again.global_steps = memory.step + 1
    assert steps(again, 3) == before

    resumed = start(memory=memory, select="signal", allocate="signal", objective="same")
    resumed.train_dataloader.load_state_dict(state)
    resumed.global_steps = memory.step + 4
    for batch in after:
        other = resumed._next_train_batch(8)
        for key in ("number", prompt_memory.WEIGHT, next_batch.RESPONSES):
            assert list(other[key]) == list(batch[key]), key


def test_prompts_that_teach_get_more_responses(start):
    memory = trained()
    trainer = start(memory=memory, allocate="signal")
    trainer.global_steps = memory.step + 1
    batch = trainer._next_train_batch()
    counts, weights = np.array(batch[next_batch.RESPONSES]), np.array(batch[prompt_memory.WEIGHT])
    signals = choice.expected(*memory.forecast([name(k) for k in numbers(batch)], trainer.global_steps))
    assert (counts == choice.allocate(signals, 8 * N)).all() and counts.sum() == 8 * N and counts.min() >= 1
    np.testing.assert_allclose(weights * counts, N)
    teaches = np.array(numbers(batch)) % 3 == 1
    assert counts[teaches].mean() > N > counts[~teaches].mean()
    assert 0 < metrics.drain()["krpo/rollouts_saved"] < 1


def test_an_epoch_that_ends_among_the_candidates_brings_no_prompt_twice(start):
    trainer = start(prompts=20, batch=8, select="signal", select_from=2)
    for batch in steps(trainer, 20):
        assert len(set(batch)) == 8


def test_the_estimator_multiplies_by_the_weights(start):
    trainer = start(memory=trained(), select="signal", objective="same")
    run = prompt_memory.run()
    trainer.global_steps = run.memory.step + 1
    memory = run.memory
    run.names = {"u": name(0), "v": name(1)}
    rewards = torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    given = {"token_level_rewards": rewards, "response_mask": torch.ones(4, 1), "index": np.array(list("uuvv"), object)}
    plain, _ = compute_advantage("krpo_memory", **given, config=trainer.config.algorithm)
    run.memory, run.weights = memory, {"u": 0.5, "v": 3.0}
    weighed, _ = compute_advantage("krpo_memory", **given, config=trainer.config.algorithm)
    torch.testing.assert_close(weighed, plain * torch.tensor([[0.5], [0.5], [3.0], [3.0]]))


def test_dead_groups_and_the_pool_are_logged(start):
    memory = trained()
    trainer = start(memory=memory)
    trainer.global_steps = memory.step + 1
    run = prompt_memory.run()
    run.names = {f"u{k}": name(k) for k in range(6)}
    rewards = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]] * 2).reshape(-1, 1)
    index = np.repeat([f"u{k}" for k in range(6)], 2).astype(object)
    compute_advantage("krpo_memory", rewards, torch.ones(12, 1), trainer.config.algorithm, index)
    logged = metrics.drain()
    assert logged["krpo/dead"] == pytest.approx(4 / 6)
    assert 0.6 < logged["krpo/dead_foretold"] < 1
    expected = run.memory.forecast([name(k) for k in range(64)], memory.step + 2)
    quartiles = [logged[f"krpo/pool_{part}"] for part in ("low", "median", "high")]
    assert quartiles == pytest.approx(np.quantile(expected.mean, [0.25, 0.5, 0.75]).tolist())
    assert logged["krpo/pool_std"] == pytest.approx(expected.std.mean())


def test_more_responses_than_given_are_an_error(start):
    trainer = start(memory=trained(), allocate="signal")
    prompt_memory.run().responses = {"u": 2, "v": 1}
    next_batch.check_responses(trainer, ["u_0_0", "u_1_0", "u_1_1", "v_0_0", "pad_0_0"])
    with pytest.raises(RuntimeError, match="gave a prompt 1 responses, and verl made 2.*__rollout_n__"):
        next_batch.check_responses(trainer, ["v_0_0", "v_1_0"])


def test_a_trainer_that_fetches_in_its_own_way_is_refused(start):
    trainer = start(select="signal")

    class Own(type(trainer)):
        def _next_train_batch(self, num_prompts=None):
            pass

    trainer.__class__ = Own
    with pytest.raises(RuntimeError, match="Own has a way of its own to fetch prompts.*select=none"):
        next_batch.begin(trainer)


def test_data_with_nothing_to_choose_are_refused(start):
    with pytest.raises(ValueError, match="from 32 candidates, more than the data's 24 prompts"):
        start(prompts=24, select="signal")
    with pytest.raises(ValueError, match="none of the data's 64 prompts comes twice in 2 steps of 32"):
        start(steps=2, select="signal")
    with pytest.raises(ValueError, match="comes twice in 8 steps of 8 candidates.*allocate=none"):
        start(steps=8, allocate="signal")
    start(steps=3, select="signal")
