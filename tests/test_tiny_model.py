import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.utils.tokenizer.chat_template import initialize_system_prompt, initialize_turn_separator

from verl_krpo import tiny_model
from verl_krpo.data.arithmetic import is_test
from verl_krpo.reward.answer_tag import compute_score


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model.build(out, seed=3, steps=2)
    return out


def test_reloaded_tokenizer_is_the_same(folder):
    made, reloaded = tiny_model.tokenizer(), AutoTokenizer.from_pretrained(folder)
    for text in ("12+34=\n", "<answer>46</answer>", " a  b\n\n\tc it's", "naïve ½ 漢字", "<think>x</think>"):
        ids = reloaded(text)["input_ids"]
        assert ids == made(text)["input_ids"]
        assert reloaded.decode(ids, skip_special_tokens=True) == text
    assert len(reloaded("\n")["input_ids"]) == 1
    assert len(reloaded("1234567\n")["input_ids"]) == 8
    assert len(reloaded("<answer>46</answer>")["input_ids"]) == 4
    assert reloaded.pad_token_id != reloaded.eos_token_id


def test_chat_template(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    user = [{"role": "user", "content": "12+34="}]
    text = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    assert text == "12+34=\n"
    both = [*user, {"role": "assistant", "content": "<answer>46</answer>"}]
    assert tokenizer.apply_chat_template(both, tokenize=False) == f"12+34=\n<answer>46</answer>{tokenizer.eos_token}"
    assert initialize_system_prompt(tokenizer) == []
    assert initialize_turn_separator(tokenizer) == []


def test_reloaded_model_is_the_same(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = tiny_model.tokenizer()
    assert model.config.model_type == "qwen2" and model.dtype == torch.float32
    rebuilt = tiny_model.untrained(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, seed=3)
    tiny_model.warm_start(rebuilt, tokenizer, steps=2, seed=3)
    for name, weight in rebuilt.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_built_once(folder, capsys):
    before = (folder / "model.safetensors").stat().st_mtime_ns
    tiny_model.build(folder, seed=3, steps=2)
    assert "up to date" in capsys.readouterr().out and (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_folder_of_someone_else_s_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="choose another folder"):
        tiny_model.build(tmp_path, steps=1)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_shares_of_the_demonstrations():
    rng = random.Random(0)
    problems = tiny_model._sums(12_000, held_out=False, rng=rng)
    assert not any(is_test(problem.expression) for problem in problems)
    scores = [compute_score("sums", tiny_model.demonstration(p, rng), p.answer)["score"] for p in problems]
    shares = {score: scores.count(score) / len(scores) for score in set(scores)}
    # Five binomial standard deviations of 12,000 draws are below 0.022.
    assert shares == pytest.approx({1.0: 1 / 3, 0.0: 1 / 4, 0.5: 1 / 4, 0.01: 1 / 6}, abs=0.022)


def test_the_warm_start_lowers_the_loss_and_leaves_the_global_random_state():
    tokenizer = tiny_model.tokenizer()
    state = torch.random.get_rng_state()
    model = tiny_model.untrained(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, seed=0)
    tiny_model.warm_start(model, tokenizer, steps=30, seed=0)
    assert torch.equal(state, torch.random.get_rng_state())
    assert tiny_model.sampled_reward(model, tokenizer, count=64, seed=0)["format"] > 0.5
