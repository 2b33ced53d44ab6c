"""A published dataset -> verl parquet: what the dataset files of this folder share.

Each of those files holds one `DATASET`, which says where the records are, which columns they have and how a record
becomes a problem. Records come from the Hugging Face hub, or from local files in the same schema.
"""

import csv
import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from verl_krpo.data import parquet

BENCHMARKS = ("math500", "aime24", "aime25", "amc23", "minerva", "olympiadbench")
TRAINING = ("openmath_instruct", "gsm8k", "math", "dapo_math")
NAMES = TRAINING + BENCHMARKS
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")


class Problem(NamedTuple):
    question: str
    answer: str
    extra: dict = {}


@dataclass(frozen=True)
class Dataset:
    """repo, configs  where the hub has it; every config is read
    splits         our split -> theirs
    columns        the columns of a record that `problem` reads
    problem        a record -> its problem, or None to leave the record out
    about          for the card: what it is, size, license, source
    boxed          ask for \\boxed{} in the user's message (the `math` reward); else for <think> and <answer>
    held_out       one problem in this many, by a hash of the question, goes to `test` where the source has no split
    """

    name: str
    repo: str
    splits: dict[str, str]
    columns: tuple[str, ...]
    problem: Callable[[dict], Problem | None]
    about: str
    configs: tuple[str | None, ...] = (None,)
    boxed: bool = True
    held_out: int | None = None


def prepare(
    name: str,
    out: str | os.PathLike,
    source: str | os.PathLike | None = None,
    limit: int | None = None,
    topic: str | None = None,
) -> dict[str, Path]:
    """Write the dataset `name` to OUT/<split>.parquet with a card; return the paths.

    source  a file or folder of parquet, jsonl, json or csv in the dataset's own schema, instead of the hub
    limit   at most so many problems a split
    topic   only problems of this topic (openmath_instruct)
    ValueError for an unknown name, limit or topic, a missing column, or a split without problems; FileNotFoundError
    when `source` has no files; ConnectionError when the hub cannot be reached.
    """
    if name not in NAMES:
        raise ValueError(f"dataset {name!r} is not one of {', '.join(NAMES)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1")
    module = importlib.import_module(f"verl_krpo.data.{name}")
    dataset = module.DATASET
    if topic is not None:
        topics = getattr(module, "TOPICS", ())
        if topic not in topics:
            raise ValueError(f"{name} has no topic {topic!r}" + (f": one of {', '.join(topics)}" if topics else ""))
        dataset = replace(dataset, problem=lambda record: _of_topic(module.DATASET.problem(record), topic))
    settings = {
        "name": name,
        "source": dataset.repo if source is None else str(Path(source).resolve()),
        "files": None if source is None else _fingerprint(dataset, Path(source)),
        "limit": limit,
        "topic": topic,
        "code": parquet.checksum(Path(module.__file__)),
    }
    return parquet.write(out, settings, lambda: rows(dataset, source, limit), dataset.about)


def _of_topic(problem: Problem | None, topic: str) -> Problem | None:
    return problem if problem is not None and problem.extra["topic"] == topic else None


def rows(dataset: Dataset, source: str | os.PathLike | None = None, limit: int | None = None) -> parquet.Splits:
    """verl rows by split: each question once, none of a test split in a training split."""
    made: dict[str, list[dict]] = {}
    seen: set[str] = set()
    # The test split first, so that it is the training split which loses a question that both have.
    for split in sorted(dataset.splits):
        found = _problems(dataset, _records(dataset, dataset.splits[split], source), seen)
        if dataset.held_out is None:
            made[split] = [_row(dataset, problem, split, i) for i, problem in enumerate(islice(found, limit))]
        else:
            made = _divided(dataset, found, limit)
    return {split: made[split] for split in sorted(made, reverse=True)}


def _problems(dataset: Dataset, records: Iterable[dict], seen: set[str]) -> Iterator[Problem]:
    for number, record in enumerate(records):
        missing = [column for column in dataset.columns if column not in record]
        if missing:
            raise ValueError(
                f"{dataset.name}, record {number}: no column {', '.join(missing)} among {', '.join(record)}; "
                f"the schema is that of {dataset.repo}"
            )
        problem = dataset.problem(record)
        if problem is not None and problem.answer.strip() and problem.question not in seen:
            seen.add(problem.question)
            yield problem


def _divided(dataset: Dataset, found: Iterable[Problem], limit: int | None) -> parquet.Splits:
    made: parquet.Splits = {"train": [], "test": []}
    for problem in found:
        split = "test" if crc32(problem.question.encode()) % dataset.held_out == 0 else "train"
        if limit is None or len(made[split]) < limit:
            made[split].append(_row(dataset, problem, split, len(made[split])))
        elif all(len(rows) >= limit for rows in made.values()):
            break
    return made


def _row(dataset: Dataset, problem: Problem, split: str, index: int) -> dict:
    question = f"{problem.question}\n\n{parquet.BOXED}" if dataset.boxed else problem.question
    system = None if dataset.boxed else parquet.THINK_AND_ANSWER
    return parquet.row(dataset.name, question, problem.answer, split, index, system, **problem.extra)


def _records(dataset: Dataset, split: str, source: str | os.PathLike | None) -> Iterator[dict]:
    from tqdm import tqdm

    stream = _hub(dataset, split) if source is None else _local(dataset, split, Path(source))
    return iter(tqdm(stream, desc=f"{dataset.name} {split}", unit=" records", disable=None))


def _hub(dataset: Dataset, split: str) -> Iterator[dict]:
    import datasets

    for config in dataset.configs:
        try:
            yield from datasets.load_dataset(dataset.repo, config, split=split, streaming=True)
        except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
            # ConnectionError and its kin are OSErrors, as is what huggingface_hub raises in offline mode.
            raise ConnectionError(
                f"{dataset.name}: cannot read {dataset.repo} from the Hugging Face hub ({type(error).__name__}). "
                f"Without a connection, fetch it elsewhere and pass its files: --source FOLDER"
            ) from error


def _files(dataset: Dataset, split: str, source: Path) -> list[Path]:
    """The files of a split: those with a part of their path that starts with its name, all for an only split."""
    if source.is_file():
        return [source]
    found = sorted(p for p in source.rglob("*") if p.suffix in SUFFIXES and ".cache" not in p.parts)
    named = [p for p in found if any(part.startswith(split) for part in p.relative_to(source).parts)]
    chosen = named or (found if len(dataset.splits) == 1 else [])
    if not chosen:
        raise FileNotFoundError(f"{dataset.name}: --source {source} holds no {split}*{{{','.join(SUFFIXES)}}}")
    return chosen


def _fingerprint(dataset: Dataset, source: Path) -> str:
    files = {file for split in dataset.splits.values() for file in _files(dataset, split, source)}
    return f"{crc32(''.join(f'{p} {p.stat().st_size} {p.stat().st_mtime_ns}' for p in sorted(files)).encode()):08x}"


def _local(dataset: Dataset, split: str, source: Path) -> Iterator[dict]:
    import pyarrow.parquet

    for file in _files(dataset, split, source):
        if file.suffix == ".parquet":
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
                yield from batch.to_pylist()
        elif file.suffix == ".csv":
            with open(file, newline="", encoding="utf-8") as lines:
                yield from csv.DictReader(lines)
        elif file.suffix == ".jsonl":
            with open(file, encoding="utf-8") as lines:
                yield from (json.loads(line) for line in lines if line.strip())
        elif file.suffix == ".json":
            held = json.loads(file.read_text(encoding="utf-8"))
            yield from held if isinstance(held, list) else [held]
        else:
            raise ValueError(f"{dataset.name}: cannot read {file}; it must be one of {', '.join(SUFFIXES)}")
