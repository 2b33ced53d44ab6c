"""The outer form of an answer: what is a list, a set, a tuple, an assignment, and of what parts.

    1, 2   1 or 2   \\pm 2   x=1, x=2     "list"     any order
    \\{1, 2\\}                             "set"      any order, a part counts once
    (1, 2)   [0, 1)   (x,y)=(1,2)         "tuple"    this order, inside these brackets
    a=1, b=2                              "tuple"    whose parts have names of their own
    anything else                         "one"

Text only: the parts are read again, as answers of their own.
"""

import re
from dataclasses import dataclass

from verl_krpo.reward.spelling import closing

_NAME = r"\\?[a-zA-Z]+(?:_(?:\w|\{[^{}]*\}))?(?:\([a-z]\))?"
_NAMED = re.compile(rf"({_NAME}) ?(?:=|\\in(?![a-z])) ?(?:.*[^<>\\=]= ?)?([^=]+)")  # of a=b=c the last
_VECTOR = re.compile(rf"\(({_NAME}(?: ?, ?{_NAME})+)\) ?= ?(\(.*\))")
_UNGROUPED = re.compile(r"\\lor|[,;:=()\[\]{}]")
_SIGN = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!,?\d)|" + _UNGROUPED.pattern)


@dataclass(frozen=True)
class Form:
    """`names` has one name for a part where it is assigned to one, else it is empty; `brackets` are a tuple's."""

    kind: str
    parts: tuple[str, ...]
    names: tuple[str, ...] = ()
    brackets: str = ""


def form(text: str) -> Form:
    """The form of a text of spelling.spelled."""
    if found := _VECTOR.fullmatch(text):
        names, values = split(found[1]), split(found[2][1:-1])
        if len(names) == len(values):
            return Form("tuple", tuple(values), tuple(names), "()")
    parts = [signed for part in split(text) for signed in _signed(part)]
    if len(parts) > 1:
        return _list(parts)
    if text.startswith(("(", "[", "\\{")):
        opened = 2 if text[0] == "\\" else 1
        end = closing(text, opened - 1)
        if end == len(text) - 1:
            inner = text[opened : end - (opened == 2)].strip()
            inside = [signed for part in split(inner, grouped=False) for signed in _signed(part)]
            if opened == 2:
                return Form("set", tuple(inside))
            if len(inside) > 1:
                return Form("tuple", tuple(inside), brackets=text[0] + text[-1])
            return form(inner) if text[0] == "(" and inner else Form("one", (text,))
    if found := _NAMED.fullmatch(text):
        return Form("one", (found[2].strip(),), (found[1],))
    return Form("one", (text,))


def _signed(part: str) -> list[str]:
    if "\\pm" not in part or "\\{" in part:
        return [part]
    return [part.replace("\\pm", sign).replace("\\mp", other) for sign, other in ("+-", "-+")]


def _list(parts: list[str]) -> Form:
    assigned = [_NAMED.fullmatch(part) for part in parts]
    if not assigned[0]:
        return Form("list", tuple(parts))
    name = assigned[0][1]
    if all(assigned):
        values, names = (tuple(found[i].strip() for found in assigned) for i in (2, 1))
        if len(set(names)) == len(names):
            return Form("tuple", values, names)
        return Form("list", values, names) if set(names) == {name} else Form("list", tuple(parts))
    if not any(assigned[1:]) and not any("=" in part for part in parts[1:]):  # x = 1, 2
        return Form("list", (assigned[0][2].strip(), *parts[1:]), (name,) * len(parts))
    return Form("list", tuple(parts))


def split(text: str, separators: tuple[str, ...] = (",", ";", "\\lor"), grouped: bool = True) -> list[str]:
    """The parts between separators outside of brackets; `grouped` keeps 1,000 in one part."""
    parts, start, depth = [], 0, 0
    for found in (_SIGN if grouped else _UNGROUPED).finditer(text):
        depth += (found[0] in "([{") - (found[0] in ")]}")
        if depth == 0 and found[0] in separators:
            parts.append(text[start : found.start()])
            start = found.end()
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]
