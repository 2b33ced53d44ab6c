"""Every dataset from small local files in the schema that the hub has, with problems of our own."""

import csv
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from omegaconf import OmegaConf

from verl_krpo.data import arithmetic, dapo_math, openmath_instruct, parquet, source
from verl_krpo.reward import answer_tag
from verl_krpo.reward import math as math_reward

DAPO = (
    "Solve the problem below step by step. End with a line of the form Answer: $Answer.\n\n"
    'Find $x$ with $2x = 10$.\n\nThe second line.\n\nRemember the line that starts with "Answer:".'
)
MATH = {"level": "Level 2", "type": "Algebra"}
OLYMPIAD = {
    "id": 1,
    "solution": ["..."],
    "image_1": None,
    "modality": "Text-only",
    "difficulty": "Competition",
    "is_multiple_answer": False,
    "unit": None,
    "answer_type": "Numerical",
    "error": None,
    "question_type": "Open-ended",
    "subfield": "Algebra",
    "subject": "Math",
    "language": "English",
}

# dataset -> {file: records}
FILES = {
    "gsm8k": {
        "main/train-00000-of-00001.parquet": [
            {"question": "Two and three?", "answer": "2+3=<<2+3=5>>5\n#### 5"},
            {"question": "A thousand twice?", "answer": "Twice.\n#### 2,000"},
            {"question": "In both?", "answer": "#### 1"},
        ],
        "main/test-00000-of-00001.parquet": [{"question": "In both?", "answer": "#### 1"}],
    },
    "math": {
        "algebra/train-00000-of-00001.parquet": [
            {"problem": "Half of one?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", **MATH},
            {"problem": "No box?", "solution": "It is 3.", **MATH},
        ],
        "geometry/train-00000-of-00001.parquet": [{"problem": "Two?", "solution": "$\\boxed 2$", **MATH}],
        "algebra/test-00000-of-00001.parquet": [{"problem": "Three?", "solution": "\\boxed{3}", **MATH}],
    },
    "dapo_math": {
        "data/dapo-math-17k.parquet": [
            {
                "data_source": "math_dapo",
                "prompt": [{"content": DAPO, "role": "user"}],
                "ability": "MATH",
                "reward_model": {"ground_truth": "5", "style": "rule-lighteval/MATH_v2"},
                "extra_info": {"index": str(i)},
            }
            for i in range(100)
        ]
    },
    "openmath_instruct": {
        "data/train_1M-00000-of-00003.parquet": [
            {
                "problem": f"What is the probability of {i % 200} heads?",
                "generated_solution": "...",
                "expected_answer": str(i % 200),
                "problem_source": "augmented_math",
            }
            for i in range(400)
        ],
        "data/train_2M-00000-of-00006.parquet": [
            {"problem": "Elsewhere", "generated_solution": "", "expected_answer": "1", "problem_source": "math"}
        ],
    },
    "math500": {
        "test.jsonl": [
            {
                "problem": "Twice four?",
                "solution": "\\boxed{8}",
                "answer": "8",
                "subject": "Algebra",
                "level": 1,
                "unique_id": "test/algebra/1.json",
            }
        ]
    },
    "aime24": {
        "data/train-00000-of-00001.parquet": [
            {"id": 60, "problem": "Find it.", "solution": "...", "answer": "033", "url": "https://x", "year": "2024"}
        ]
    },
    "aime25": {"test.jsonl": [{"problem": "Find that.", "answer": "70", "id": "0"}]},
    "amc23": {"test-00000-of-00001.parquet": [{"id": 0, "question": "How far?", "answer": "27.0", "url": "https://x"}]},
    "minerva": {"test.jsonl": [{"question": "Which wavelength in metres?", "answer": "4.5e-7"}]},
    "olympiadbench": {
        "OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet": [
            {**OLYMPIAD, "question": "Both roots?", "final_answer": ["$1$", "$-2$."], "context": "Let $x^2+x=2$."},
            {**OLYMPIAD, "question": "Prove it.", "final_answer": None, "context": None},
            {**OLYMPIAD, "question": "One half?", "final_answer": ["$\\frac{1}{2}$"], "context": None},
        ]
    },
}

# dataset -> {split: [(a part of the question, ground truth)]}
EXPECTED = {
    "gsm8k": {"train": [("Two and three?", "5"), ("A thousand twice?", "2000")], "test": [("In both?", "1")]},
    "math": {"train": [("Half of one?", "\\frac{1}{2}"), ("Two?", "2")], "test": [("Three?", "3")]},
    "dapo_math": {"train": [("Find $x$ with $2x = 10$.\n\nThe second line.", "5")]},
    "math500": {"test": [("Twice four?", "8")]},
    "aime24": {"test": [("Find it.", "33")]},
    "aime25": {"test": [("Find that.", "70")]},
    "amc23": {"test": [("How far?", "27")]},
    "minerva": {"test": [("Which wavelength in metres?", "4.5e-7")]},
    "olympiadbench": {"test": [("Let $x^2+x=2$.\nBoth roots?", "1, -2"), ("One half?", "\\frac{1}{2}")]},
}


def write_records(file: Path, records: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(records))
    elif file.suffix == ".csv":
        with open(file, "w", newline="") as lines:
            writer = csv.DictWriter(lines, records[0])
            writer.writeheader()
            writer.writerows(records)
    else:
        file.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def local(tmp_path):
    """A function that writes a dataset's files as a snapshot of its repository has them, and returns the folder."""

    def write_all(name):
        for file, records in FILES[name].items():
            write_records(tmp_path / "snapshot" / file, records)
        return tmp_path / "snapshot"

    return write_all


def read(path):
    return datasets.load_dataset("parquet", data_files=str(path))["train"]


@pytest.mark.parametrize("name", list(EXPECTED))
def test_local_files_in_the_published_schema(name, local, tmp_path):
    paths = source.prepare(name, tmp_path / "out", source=local(name))
    assert set(paths) == set(EXPECTED[name])
    for split, expected in EXPECTED[name].items():
        rows = read(paths[split])
        assert [row["reward_model"]["ground_truth"] for row in rows] == [answer for _, answer in expected]
        for index, (row, (question, _)) in enumerate(zip(rows, expected, strict=True)):
            assert row["prompt"] == [{"role": "user", "content": f"{question}\n\n{parquet.BOXED}"}]
            assert row["data_source"] == name and row["reward_model"]["style"] == "rule"
            assert row["extra_info"]["split"] == split and row["extra_info"]["index"] == index


def test_every_dataset_is_tested():
    assert set(FILES) == set(source.NAMES) and set(EXPECTED) == set(source.NAMES) - {"openmath_instruct"}


def test_openmath_instruct_is_divided_and_chosen_by_topic(local, tmp_path):
    paths = source.prepare("openmath_instruct", tmp_path / "out", local("openmath_instruct"))
    train, test = read(paths["train"]), read(paths["test"])
    assert len(train) + len(test) == 200 and 0 < len(test) < 20
    assert train[0]["prompt"][0] == {"role": "system", "content": parquet.THINK_AND_ANSWER}
    assert {row["extra_info"]["topic"] for row in train} == {"probability"}
    with pytest.raises(ValueError, match="no rows"):
        source.prepare("openmath_instruct", tmp_path / "none", local("openmath_instruct"), topic="geometry")


@pytest.mark.parametrize(
    ("question", "topic"),
    [
        ("A fair die is rolled twice. What is the probability that both are six?", "probability"),
        ("In how many ways can five people sit in a row?", "counting"),
        ("A triangle has sides 3, 4 and 5. What is its area?", "geometry"),
        ("What is the remainder of $7^{100}$ divided by 5?", "number_theory"),
        ("Evaluate $\\int_0^1 x^2\\,dx$.", "calculus"),
        ("Solve $x^2 - 5x + 6 = 0$.", "algebra"),
    ],
)
def test_topics(question, topic):
    assert openmath_instruct.topic_of(question) == topic


def test_a_problem_without_instructions_is_left_whole():
    record = {"prompt": [{"role": "user", "content": "One.\n\nTwo."}], "reward_model": {"ground_truth": " 5 "}}
    assert dapo_math.problem(record) == ("One.\n\nTwo.", "5", {})


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_file_formats(suffix, tmp_path):
    write_records(tmp_path / f"mine{suffix}", FILES["aime25"]["test.jsonl"])
    for given in (tmp_path / f"mine{suffix}", tmp_path):
        paths = source.prepare("aime25", tmp_path / "out", given)
        assert read(paths["test"])[0]["reward_model"]["ground_truth"] == "70"
        (tmp_path / "out" / "test.parquet").unlink()


def test_written_once_and_again_when_the_files_change(local, tmp_path, capsys):
    folder = local("gsm8k")
    source.prepare("gsm8k", tmp_path / "out", folder)
    source.prepare("gsm8k", tmp_path / "out", folder)
    said = capsys.readouterr().out.splitlines()
    assert ["up to date" in line for line in said] == [False, False, True, True]
    write_records(folder / "main/test-00000-of-00001.parquet", [{"question": "New?", "answer": "#### 4"}])
    paths = source.prepare("gsm8k", tmp_path / "out", folder)
    assert "up to date" not in capsys.readouterr().out.splitlines()[-1]
    assert read(paths["test"])[0]["reward_model"]["ground_truth"] == "4" and len(read(paths["train"])) == 3


def test_limit_and_card(local, tmp_path):
    paths = source.prepare("gsm8k", tmp_path / "out", local("gsm8k"), limit=1)
    assert len(read(paths["train"])) == 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "MIT" in card and parquet.checksum(paths["train"]) in card and parquet.BOXED in card
    assert parquet.recorded(tmp_path / "out")["files"]["train.parquet"]["rows"] == 1
    # The card makes the folder a dataset of its own, splits and all.
    assert set(datasets.load_dataset(str(tmp_path / "out"))) == {"train", "test"}


def test_without_the_hub_the_error_names_dataset_and_option(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="aime24: cannot read HuggingFaceH4/aime_2024.*--source"):
        source.prepare("aime24", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.parquet"))


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"name": "gsm9k"}, ValueError, "'gsm9k' is not one of"),
        ({"name": "aime25", "limit": 0}, ValueError, "limit=0"),
        ({"name": "aime25", "topic": "algebra"}, ValueError, "aime25 has no topic 'algebra'"),
        ({"name": "openmath_instruct", "topic": "cooking"}, ValueError, "one of probability"),
        ({"name": "gsm8k"}, FileNotFoundError, r"gsm8k: --source .* holds no train\*"),
        ({"name": "minerva"}, ValueError, "minerva, record 0: no column question among problem, answer, id"),
    ],
)
def test_what_is_wrong_is_named(arguments, error, said, tmp_path):
    write_records(tmp_path / "test.jsonl", FILES["aime25"]["test.jsonl"])
    with pytest.raises(error, match=said):
        source.prepare(**arguments, out=tmp_path / "out", source=tmp_path)


def test_verl_reads_every_dataset(local, tmp_path):
    from verl.utils.dataset.rl_dataset import RLHFDataset

    from verl_krpo import tiny_model

    paths = source.prepare("olympiadbench", tmp_path / "out", local("olympiadbench"))
    config = OmegaConf.create({"cache_dir": str(tmp_path / "cache"), "filter_overlong_prompts": True})
    data = RLHFDataset([str(paths["test"])], tiny_model.tokenizer(), config)
    assert len(data) == 2 and data[1]["raw_prompt"][0]["content"].startswith("One half?")


def test_prompts_ask_for_what_the_rewards_read():
    example = parquet.THINK_AND_ANSWER.split("example: ")[1]
    assert answer_tag.compute_score("arithmetic", example, "12")["score"] == 1
    assert math_reward.compute_score("math", parquet.BOXED.replace("{}", "{12}"), "12")["score"] == 1
    row = arithmetic.rows("easy", 1, 1, 0)["train"][0]
    assert row["prompt"][0]["content"] == parquet.THINK_AND_ANSWER
