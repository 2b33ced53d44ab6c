import ast
import operator

import datasets
import pytest
from omegaconf import OmegaConf

from verl_krpo import tiny_model
from verl_krpo.data import arithmetic, parquet

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def parsed(expression: str) -> tuple[int, list[int]]:
    """Value and numbers of an expression, read by Python's own parser."""
    numbers = []

    def value(node):
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp):
            assert isinstance(node.op, ast.USub)
            return -value(node.operand)
        numbers.append(node.value)
        return node.value

    return value(ast.parse(expression, mode="eval").body), numbers


@pytest.mark.parametrize("level", ["easy", "normal", "hard"])
def test_problems_are_right_and_within_their_level(level):
    train, test = arithmetic.problems(level, 2000, 500, seed=1)
    bounds = arithmetic.LEVELS[level]
    for problem in train + test:
        value, numbers = parsed(problem.expression)
        assert str(value) == problem.answer
        assert len(numbers) == problem.terms <= bounds.max_terms
        assert max(len(str(number)) for number in numbers) <= problem.digits <= bounds.max_digits
        assert problem.expression in problem.question.replace(" ", "")
        assert len(problem.question) < 128
    assert {problem.terms for problem in train} == set(range(2, bounds.max_terms + 1))
    assert {problem.digits for problem in train} == set(range(1, bounds.max_digits + 1))


def test_sums():
    train, test = arithmetic.problems("sums", 3000, 500, seed=0)
    for problem in train + test:
        a, b = problem.question.removesuffix("=").split("+")
        assert len(a) == len(b) == 2
        assert int(a) + int(b) == int(problem.answer) and 0 <= min(int(a), int(b)) <= max(int(a), int(b)) <= 99
    pairs = [{frozenset(p.question[:-1].split("+")) for p in split} for split in (train, test)]
    assert not pairs[0] & pairs[1]


@pytest.mark.parametrize("level", list(arithmetic.LEVELS))
def test_no_seed_s_test_set_meets_another_seed_s_training_set(level):
    splits = [arithmetic.problems(level, 1500, 300, seed) for seed in (0, 1)]
    train = {problem.expression for split in splits for problem in split[0]}
    test = {problem.expression for split in splits for problem in split[1]}
    assert not train & test
    for chosen in (split for pair in splits for split in pair):
        assert len({problem.question for problem in chosen}) == len(chosen)


def test_the_seed_decides():
    assert arithmetic.problems("easy", 50, 10, 0) == arithmetic.problems("easy", 50, 10, 0)
    assert arithmetic.problems("easy", 50, 10, 0) != arithmetic.problems("easy", 50, 10, 1)


def test_100_000_rows_in_verl_s_schema(tmp_path, capsys):
    paths = arithmetic.prepare(tmp_path, "normal")
    train, test = (datasets.load_dataset("parquet", data_files=str(paths[s]))["train"] for s in ("train", "test"))
    assert len(train) + len(test) == 100_000
    assert not set(train.map(_user, remove_columns=train.column_names)["user"]) & set(
        test.map(_user, remove_columns=test.column_names)["user"]
    )
    first = train[0]
    assert [message["role"] for message in first["prompt"]] == ["system", "user"]
    assert "<think>" in first["prompt"][0]["content"] and "<answer>" in first["prompt"][0]["content"]
    assert first["data_source"] == "arithmetic_normal" and first["reward_model"]["style"] == "rule"
    assert first["extra_info"]["split"] == "train" and first["extra_info"]["index"] == 0
    card = parquet.recorded(tmp_path)
    assert card["files"]["train.parquet"] == {"rows": 80_000, "sha256": parquet.checksum(paths["train"])}
    assert "80,000 rows" in capsys.readouterr().out


def _user(example):
    return {"user": example["prompt"][-1]["content"].replace(" ", "")}


def test_prepared_once_and_mended_when_damaged(tmp_path, capsys):
    def prepare():
        arithmetic.prepare(tmp_path, "sums", train_rows=64, test_rows=16)
        return capsys.readouterr().out.splitlines()

    assert "up to date" not in prepare()[0]
    whole = (tmp_path / "train.parquet").read_bytes()
    assert all("up to date" in line for line in prepare())
    (tmp_path / "train.parquet").write_bytes(whole[:-1])
    assert "up to date" not in prepare()[0]
    assert (tmp_path / "train.parquet").read_bytes() == whole


def test_verl_reads_the_rows(tmp_path):
    from verl.utils.dataset.rl_dataset import RLHFDataset

    paths = arithmetic.prepare(tmp_path, "sums", train_rows=64, test_rows=16)
    config = OmegaConf.create({"cache_dir": str(tmp_path / "cache"), "filter_overlong_prompts": False})
    data = RLHFDataset([str(paths["train"])], tiny_model.tokenizer(), config)
    assert len(data) == 64
    assert data[0]["raw_prompt"][0]["role"] == "user" and data[0]["raw_prompt"][0]["content"].endswith("=")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("hardest", 10, 10, 0), "level='hardest'"),
        (("sums", 9000, 10, 0), "no new problem"),
        (("easy", 0, 10, 0), "train_rows=0"),
        (("easy", 10, -1, 0), "test_rows=-1"),
    ],
)
def test_what_cannot_be_made_is_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        arithmetic.problems(*arguments)
