"""Rows -> verl parquet, with a dataset card beside it.

A row as verl's RLHFDataset reads it:

    data_source    str, picks the metric name in validation
    prompt         list of {"role", "content"}
    reward_model   {"style": "rule", "ground_truth": str}
    extra_info     {"split", "index", ...}

The card (README.md) starts with a YAML block that holds the settings, row counts and SHA-256 of each file. The same
settings with intact files are not written again.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import yaml

Splits = dict[str, list[dict]]

THINK_AND_ANSWER = (
    "You solve the problem that the user states. Reason first, between <think> and </think>. Then give the result "
    "alone, with no spaces around it, between <answer> and </answer>. For example: "
    "<think>3 times 4 is 12.</think><answer>12</answer>"
)
BOXED = "Reason step by step, and put the final answer within \\boxed{}."


def row(
    data_source: str,
    question: str,
    answer: str,
    split: str,
    index: int,
    system: str | None = None,
    **extra: object,
) -> dict:
    """One row in verl's schema; `system` becomes the system message."""
    messages = [{"role": "system", "content": system}] if system else []
    return {
        "data_source": data_source,
        "prompt": [*messages, {"role": "user", "content": question}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"split": split, "index": index, **extra},
    }


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def recorded(out: Path) -> dict:
    """The YAML block of the card in `out`, {} when there is none."""
    card = out / "README.md"
    if not card.exists():
        return {}
    _, _, rest = card.read_text(encoding="utf-8").partition("---\n")
    return yaml.safe_load(rest.partition("\n---\n")[0]) or {}


def write(
    out: str | os.PathLike,
    settings: dict,
    make: Callable[[], Splits],
    about: str,
) -> dict[str, Path]:
    """Write `make()` to OUT/<split>.parquet and the card; return the path of every split.

    settings  plain values that determine the rows; with the same settings and intact files nothing is made again
    about     the card's text: what the data is, where it comes from, its license
    """
    import pyarrow
    import pyarrow.parquet

    out = Path(out)
    before = recorded(out)
    if before.get("settings") == settings and _intact(out, before["files"]):
        for name, facts in before["files"].items():
            print(f"{out / name}: up to date, {facts['rows']:,} rows, sha256 {facts['sha256'][:12]}")
        return {Path(name).stem: out / name for name in before["files"]}

    out.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, rows in make().items():
        if not rows:
            raise ValueError(f"{settings['name']}: the split {split} has no rows")
        path = out / f"{split}.parquet"
        partial = path.with_suffix(".partial")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), partial)
        os.replace(partial, path)
        files[path.name] = {"rows": len(rows), "sha256": checksum(path)}
        print(f"{path}: {len(rows):,} rows, sha256 {files[path.name]['sha256'][:12]}")
        example = rows[0]
    _write_card(out, settings, files, about, example)
    return {Path(name).stem: out / name for name in files}


def _intact(out: Path, files: dict) -> bool:
    return all((out / name).exists() and checksum(out / name) == facts["sha256"] for name, facts in files.items())


def _write_card(out: Path, settings: dict, files: dict, about: str, example: dict) -> None:
    block = {
        "pretty_name": settings["name"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": Path(name).stem, "path": name} for name in files],
            }
        ],
        "settings": settings,
        "files": files,
    }
    table = "\n".join(f"| {name} | {facts['rows']:,} | `{facts['sha256']}` |" for name, facts in files.items())
    prompt = "\n".join(f"    {m['role']}: {line}" for m in example["prompt"] for line in m["content"].splitlines())
    (out / "README.md").write_text(
        f"---\n{yaml.safe_dump(block, sort_keys=False)}---\n\n# {settings['name']}\n\n{about.strip()}\n\n"
        f"| file | rows | sha256 |\n| --- | --- | --- |\n{table}\n\n"
        f"The first prompt, and its ground truth `{example['reward_model']['ground_truth']}`:\n\n{prompt}\n",
        encoding="utf-8",
    )
