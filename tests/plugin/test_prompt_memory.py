"""What names a prompt, and what a checkpoint keeps: in verl's own trainers, but for their workers."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from verl_krpo.advantage.memory import PromptMemory, krpo_memory
from verl_krpo.plugin import hooks, metrics, prompt_memory
from verl_krpo.plugin.estimator import compute_advantage
from verl_krpo.plugin.prompt_memory import prompt_id

ASK = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1="}]
IMAGE = [{"role": "user", "content": [{"type": "image", "image": object()}, {"type": "text", "text": "What is it?"}]}]
pytestmark = pytest.mark.usefixtures("no_run")


def job(tmp_path, **trainer):
    settings = {"default_local_dir": str(tmp_path), "resume_mode": "auto", "resume_from_path": None} | trainer
    actor = {"actor_rollout_ref": {"actor": {"loss_agg_mode": "token-mean"}}}
    return OmegaConf.create({"algorithm": {"adv_estimator": "krpo_memory"}, "trainer": settings, **actor})


def trainer_of(module: str, name: str, config, step: int):
    """A trainer of verl's that has not started its workers."""
    import importlib

    trainer = object.__new__(getattr(importlib.import_module(module), name))
    trainer.config, trainer.global_steps = config, step
    return trainer


TRAINERS = [("verl.trainer.ppo.v1.trainer_sync", "PPOTrainerSync"), ("verl.trainer.ppo.ray_trainer", "RayPPOTrainer")]


def test_text_names_a_prompt():
    name = prompt_id(ASK, "sums", {"index": 3})
    assert name == prompt_id([dict(message) for message in ASK], "sums", {"index": 4, "answer": "2"})
    assert name == prompt_id(ASK, "sums", None)
    assert name != prompt_id(ASK, "products", {"index": 3})
    assert name != prompt_id(ASK[1:], "sums", {"index": 3})
    assert name != prompt_id([ASK[0], {"role": "user", "content": "1+2="}], "sums", {"index": 3})
    assert name != prompt_id([{"role": "user", "content": "Add."}, ASK[1]], "sums", {"index": 3})


def test_the_index_tells_prompts_apart_that_are_more_than_text():
    tools = {"tools_kwargs": {"search": {"corpus": "a"}}}
    for raw_prompt, extra in ((IMAGE, {}), (ASK, tools)):
        first, again, other = (prompt_id(raw_prompt, "s", extra | {"index": k}) for k in (0, 0, 1))
        assert first == again != other
        with pytest.raises(ValueError, match="no extra_info.index"):
            prompt_id(raw_prompt, "s", extra)
    assert prompt_id(ASK, "s", {"tools_kwargs": {}}) == prompt_id(ASK, "s", {"index": 1})


def test_prompts_of_verls_data_set_in_any_order(tmp_path):
    """Two epochs, shuffled, from verl's own data set: rows that are the same prompt have one name."""
    import pandas as pd
    from torch.utils.data import DataLoader
    from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

    rows = [
        {"data_source": "s", "prompt": [{"role": "user", "content": f"{k % 5}?"}], "extra_info": {"index": k}}
        for k in range(10)
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    config = OmegaConf.create({"cache_dir": str(tmp_path), "prompt_key": "prompt", "filter_overlong_prompts": False})
    data = RLHFDataset(str(tmp_path / "rows.parquet"), None, config)
    epochs = []
    for seed in (0, 1):
        loader = DataLoader(data, 5, shuffle=True, generator=torch.Generator().manual_seed(seed), collate_fn=collate_fn)
        epochs.append([])
        for batch in loader:
            rows_of = zip(*(batch[key] for key in prompt_memory.PROMPT_FIELDS), strict=True)
            epochs[-1] += [prompt_id(*row) for row in rows_of]
    assert epochs[0] != epochs[1] and len(set(epochs[0])) == 5
    assert sorted(epochs[0]) == sorted(epochs[1])


@pytest.mark.parametrize(("module", "name"), TRAINERS)
def test_a_checkpoint_keeps_the_memory_to_the_bit(module, name, tmp_path, monkeypatch, capsys):
    trainer = trainer_of(module, name, job(tmp_path), 0)
    hooks.begin(lambda trainer: None, trainer)
    assert len(prompt_memory.run().memory) == 0
    _, memory = krpo_memory(torch.tensor([0.0, 1.0, 1.0]), ["a", "b", "b"], PromptMemory(), step=7)
    prompt_memory.run().memory, trainer.global_steps = memory, 7
    hooks.save_memory(lambda trainer: None, trainer)

    resumed = trainer_of(module, name, job(tmp_path), None)
    hooks.begin(lambda trainer: setattr(trainer, "global_steps", 7), resumed)
    assert "remembers 2 prompts" in capsys.readouterr().out
    for attribute, value in vars(memory).items():
        assert np.array_equal(getattr(prompt_memory.run().memory, attribute), value)

    path = f"{tmp_path}/global_step_7"
    elsewhere = trainer_of(module, name, job("/nowhere", resume_mode="resume_path", resume_from_path=path), 7)
    hooks.begin(lambda trainer: None, elsewhere)
    assert len(prompt_memory.run().memory) == 2 and prompt_memory.run().step == 7


def test_a_checkpoint_without_a_memory_starts_empty_and_says_so(tmp_path, capsys):
    prompt_memory.begin(trainer_of(*TRAINERS[0], job(tmp_path), 40))
    assert "memory starts empty: the checkpoint has no" in capsys.readouterr().out
    assert len(prompt_memory.run().memory) == 0


@pytest.mark.parametrize(("module", "name"), TRAINERS)
def test_a_trainer_that_saves_in_its_own_way_is_refused(module, name, tmp_path):
    class Own(type(trainer_of(module, name, job(tmp_path), 0))):
        def _save_checkpoint(self):
            pass

    own = object.__new__(Own)
    own.config, own.global_steps = job(tmp_path), 0
    with pytest.raises(RuntimeError, match="Own has a way of its own to save checkpoints"):
        prompt_memory.begin(own)


def test_a_job_without_memory_is_left_alone(tmp_path):
    config = job(tmp_path)
    config.algorithm.adv_estimator = "krpo_adaptive"
    trainer = trainer_of(*TRAINERS[0], config, 3)
    prompt_memory.begin(trainer)
    prompt_memory.save(trainer)
    prompt_memory.read_queue(trainer, None)
    assert prompt_memory._run is None and not list(tmp_path.iterdir())


def batch_of(uids, rewards):
    rewards = torch.tensor(rewards)[:, None]
    return {"token_level_rewards": rewards, "response_mask": torch.ones_like(rewards), "index": np.array(uids, object)}


def test_the_legacy_trainers_batch(tmp_path):
    """verl's own compute_advantage, hooked: a prompt that comes back under a new uid is known."""
    from verl.protocol import DataProto
    from verl.trainer.ppo import ray_trainer

    config = job(tmp_path).algorithm
    trainer = trainer_of(*TRAINERS[1], job(tmp_path), 0)
    prompt_memory.begin(trainer)
    for step in (1, 2):
        trainer.global_steps = step
        rewards = torch.tensor([[0.0], [1.0], [1.0]])
        data = DataProto.from_dict(
            {"token_level_rewards": rewards, "response_mask": torch.ones(3, 1)},
            {
                "uid": np.array([f"u{step}", f"v{step}", f"v{step}"], object),
                "raw_prompt": np.array([ASK, ASK[1:], ASK[1:]], object),
                "data_source": np.array(["s"] * 3, object),
                "extra_info": np.array([{"index": k} for k in (0, 1, 1)], object),
            },
        )
        advantages = ray_trainer.compute_advantage(data, "krpo_memory", config=config).batch["advantages"]
        assert advantages.shape == (3, 1) and advantages.isfinite().all()
        assert metrics.drain()["krpo/memory_known"] == step - 1
    assert len(prompt_memory.run().memory) == 2
    assert data.non_tensor_batch["uid"].tolist() == ["u2", "v2", "v2"]


def test_rows_that_nobody_named_are_an_error(tmp_path):
    config = job(tmp_path).algorithm
    with pytest.raises(RuntimeError, match="none has started in this process"):
        compute_advantage("krpo_memory", **batch_of(["a", "b"], [0.0, 1.0]), config=config)
    prompt_memory.begin(trainer_of(*TRAINERS[0], job(tmp_path), 0))
    with pytest.raises(RuntimeError, match="which prompt the rows of uid a answer"):
        compute_advantage("krpo_memory", **batch_of(["a", "b"], [0.0, 1.0]), config=config)
