"""What a run without a GPU is said to need, and how its micro-batches follow from it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from verl_krpo.backends import cpu_platform, ram

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4}
MODELS = [
    LlamaConfig(vocab_size=49152, num_key_value_heads=2, tie_word_embeddings=True, **SMALL),
    Qwen2Config(vocab_size=1000, num_key_value_heads=4, tie_word_embeddings=False, **SMALL),
]
JOB = ["algorithm.adv_estimator=grpo", "data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=8"]
LENGTHS = ["data.max_prompt_length=200", "data.max_response_length=100", "actor_rollout_ref.rollout.n=8"]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.model_type)
def test_parameters_are_counted(model):
    with torch.device("meta"):
        exact = AutoModelForCausalLM.from_config(model).num_parameters()
    assert ram.parameters(model) == pytest.approx(exact, rel=0.01)


@pytest.fixture
def prepared(compose, tmp_path, capsys):
    """prepared(model, *overrides) -> (the config a CPU trains that model with, what was printed)."""

    def prepare(model, *overrides):
        model.save_pretrained(tmp_path)
        config = compose(*JOB, *LENGTHS, f"actor_rollout_ref.model.path={tmp_path}", *overrides)
        cpu_platform.prepare(config)
        return config, capsys.readouterr().out

    return prepare


def test_a_micro_batch_of_a_real_vocabulary_fits_in_its_bytes(prepared):
    config, _ = prepared(MODELS[0])
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    tokens = actor.ppo_max_token_len_per_gpu
    assert actor.use_dynamic_bsz and rollout.log_prob_max_token_len_per_gpu == tokens
    assert tokens == ram.MICRO_BATCH_BYTES // ram.token_bytes(MODELS[0]) < 8 * 8 * 300


def test_a_tiny_models_step_is_one_micro_batch(prepared):
    config, _ = prepared(MODELS[1])
    assert config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu > 8 * 8 * 300


def test_a_micro_batch_holds_the_longest_answer(prepared):
    config, _ = prepared(MODELS[0], "data.max_response_length=9000")
    assert config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu == 9200


def test_the_memory_of_a_job_is_said(prepared, monkeypatch):
    _, said = prepared(MODELS[0])
    assert "memory: about" in said and "GiB are free" in said and "will not fit" not in said
    monkeypatch.setattr(ram, "PROCESS_BYTES", 1 << 50)
    _, said = prepared(MODELS[0])
    assert f"It will not fit. {ram.HOW_TO_NEED_LESS}" in said


def test_a_model_that_is_not_there_yet_is_no_error(compose, capsys):
    config = compose(*JOB, *LENGTHS, "actor_rollout_ref.model.path=owner/name")
    cpu_platform.prepare(config)
    assert "memory: unknown" in capsys.readouterr().out
    assert config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu == 300
