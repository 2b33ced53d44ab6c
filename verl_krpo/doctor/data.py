"""Are the data files and the reward function what verl reads?"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from verl_krpo.doctor.finding import Finding, missing

FORMATS = (".parquet", ".json", ".jsonl")
HOW_TO_WRITE = "verl-krpo data --help   (writes what verl reads)"
COMPLETE = ("data_source", "reward_model", "agent_name")  # columns that verl reads on every row once they are there


def files(config: DictConfig) -> list[str]:
    """The files of data.train_files and data.val_files."""
    entries = (config.data.train_files, config.data.val_files)
    return [path for entry in entries for path in ([entry] if isinstance(entry, str) else list(entry or []))]


def columns(config: DictConfig) -> list[Finding]:
    """The data files exist and have the columns that verl reads, filled on every row."""
    return [finding for path in dict.fromkeys(files(config)) for finding in _file(path, config.data.prompt_key)]


def _file(path: str, prompt: str) -> list[Finding]:
    if not Path(path).exists():
        return [missing(f"there is no data file {path}", "verl-krpo data --help   (writes it), or DATA_DIR=FOLDER")]
    if not path.endswith(FORMATS):
        return [missing(f"verl does not read the data file {path}", f"a file that ends in {', '.join(FORMATS)}")]
    try:
        names, read = _open(path)
    except (OSError, ValueError) as error:
        return [missing(f"the data file {path} cannot be read: {str(error).splitlines()[0]}", HOW_TO_WRITE)]
    absent = [name for name in (prompt, "data_source", "reward_model") if name not in names]
    if absent:
        fix = HOW_TO_WRITE
        if absent == [prompt] and "prompt" in names:
            fix = f"data.prompt_key=prompt   (it is {prompt})"
        elif absent == [prompt]:
            fix = f"data.prompt_key=NAME of the column that holds the prompts; the file has {', '.join(names)}"
        return [missing(f"the data file {path} has no column {', '.join(absent)}", fix)]
    findings = []
    for name in (prompt, *(name for name in COMPLETE if name in names)):
        column = read(name)
        empty = column.is_null().to_pylist()
        if any(empty):
            rows = f"{sum(empty)} of {len(empty)} rows (the first: row {empty.index(True)})"
            text = f"the data file {path} has no {name} on {rows}"
            findings.append(missing(text, f"fill in {name} on every row, or leave those rows out"))
        elif name == prompt and not _are_messages(column):
            text = f"the column {prompt} of {path} holds {_kind(column)}, verl wants a list of messages"
            findings.append(missing(text, f'write [{{"role": "user", "content": TEXT}}] there; {HOW_TO_WRITE}'))
    return findings


def _open(path: str) -> tuple[list[str], Any]:
    """The names of a file's columns, and a function that reads one as a pyarrow column."""
    import pyarrow.parquet

    if path.endswith(".parquet"):
        file = pyarrow.parquet.ParquetFile(path)
        return file.schema_arrow.names, lambda name: file.read(columns=[name]).column(name)
    import datasets

    datasets.disable_progress_bars()
    try:  # as verl does
        rows = datasets.load_dataset("json", data_files=path, split="train")
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(str(error.__cause__ or error)) from error
    return rows.column_names, lambda name: rows.data.column(name)


def _are_messages(column: Any) -> bool:
    import pyarrow

    kind = column.type
    listed = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    return listed and (pyarrow.types.is_struct(kind.value_type) or pyarrow.types.is_null(kind.value_type))


def _kind(column: Any) -> str:
    return {"string": "strings", "large_string": "strings"}.get(str(column.type), str(column.type))


def train_rows(config: DictConfig) -> int | None:
    """Rows that verl trains on, before it drops overlong prompts; None where a file is not here or is no parquet."""
    import pyarrow.parquet

    entry = config.data.train_files
    paths = [entry] if isinstance(entry, str) else list(entry or [])
    if not all(path.endswith(".parquet") and Path(path).exists() for path in paths):
        return None
    rows = sum(pyarrow.parquet.read_metadata(path).num_rows for path in paths)
    most = config.data.get("train_max_samples", -1)
    return min(rows, most) if most > 0 else rows


def reward(config: DictConfig) -> list[Finding]:
    """The job's own reward function can be loaded."""
    from verl.utils.import_utils import load_extern_object

    function = config.reward.custom_reward_function
    if not function.path:
        return []
    try:
        load_extern_object(function.path, function.name)
    except (ImportError, FileNotFoundError, AttributeError) as error:
        fix = "pip install -e '.[gpu]' in the checkout, or correct reward.custom_reward_function.path and .name"
        return [missing(f"the reward {function.name} of {function.path} cannot be loaded ({error})", fix)]
    return []
