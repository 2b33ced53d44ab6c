"""The tables of keys and metrics in docs/, from the docstrings that describe them.

python scripts/reference.py

Writes docs/configuration.md (ESTIMATORS, KpoConfig) and docs/metrics.md (plugin/metrics.py, kpo._diagnostics); a test
compares them.
"""

import dataclasses
import inspect
import re
from enum import Enum
from pathlib import Path

from verl_krpo.advantage import ESTIMATORS
from verl_krpo.config import KpoConfig
from verl_krpo.plugin import metrics
from verl_krpo.policy_loss import kpo

PAGES = [Path(__file__).parents[1] / "docs" / name for name in ("configuration.md", "metrics.md")]
# Plain symbols of the docstrings, alone, with others, or compared with 0: P0, kappa, x_{i|i-1}, Q/R, r - b.
ATOM = r"\b(?:[QRwrb]|[mP]0|kappa|[A-Za-z]_(?:\{[^{}]+\}|\w))(?!\w)"
TERM = rf"{ATOM}(?: ?[-/] ?{ATOM})*"
FORMULA = re.compile(rf"sum {ATOM} \({TERM}\)\^2|{TERM}(?: >=? 0)?")


def keys(cls: type) -> str:
    """One row a key: its default, and its line of the class's `Attributes`."""
    described = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", inspect.getdoc(cls), re.MULTILINE))
    rows = []
    for field in dataclasses.fields(cls):
        text = described[field.name]
        if isinstance(field.default, Enum):
            words = [f"`{word.value}`" for word in type(field.default)]
            explained = all(word in text for word in words if word != "`none`")
            text = text if explained else f"{', '.join(words)}: {text}"
        rows.append([f"`{field.name}`", spelled(field.default), text])
    return table(["key", "default", "what it is"], rows)


def glossary(prefix: str, described: object) -> str:
    """One row an entry `name, name   text` of a docstring; what continues it is indented further."""
    entry = r"^ *([a-z_/]+(?:, [a-z_/]+)*) {2,}(.*(?:\n {5,}.*)*)"
    entries = re.findall(entry, inspect.getdoc(described), re.MULTILINE)
    rows = [[", ".join(f"`{prefix}{name}`" for name in names.split(", ")), text] for names, text in entries]
    return table(["metric", "what it is"], rows)


def spelled(value: object) -> str:
    """As in YAML, and 1e-5 rather than 1e-05."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Enum):
        return value.value
    return value if isinstance(value, str) else re.sub("e-0", "e-", f"{value:g}")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([*cells[:-1], maths(cells[-1])] for cells in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def maths(text: str) -> str:
    """A docstring's text in a cell: on one line, its symbols as formulas."""

    def formula(found: re.Match) -> str:
        symbols = re.sub(r"\b(kappa|sum)\b", r"\\\1", re.sub(r"\b([mP])0", r"\1_0", found[0]))
        return f"${symbols.replace('>=', chr(92) + 'ge').replace('|', chr(92) + 'vert ')}$"

    return FORMULA.sub(formula, " ".join(text.split())).replace("|", r"\|")


def written(page: str) -> str:
    """The page with its tables as the code has them now."""
    tables = {
        "KpoConfig": keys(KpoConfig),
        **{estimator.keys.__name__: keys(estimator.keys) for estimator in ESTIMATORS.values()},
        "plugin/metrics.py": glossary("", metrics),
        "kpo._diagnostics": glossary("actor/", kpo._diagnostics),
    }

    def fill(found: re.Match) -> str:
        return f"{found[1]}\n\n{tables[found[2]]}\n\n<!-- end -->"

    return re.sub(r"(<!-- scripts/reference.py: (\S+) -->).*?<!-- end -->", fill, page, flags=re.DOTALL)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page.read_text()))
