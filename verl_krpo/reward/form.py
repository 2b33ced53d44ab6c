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
_VECTOR = re.compile(rf"\(({_NAME}(?: ?, ?{_NAME})+)\) ?= ?\((.*)\)")
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
        names, values = split(found[1]), split(found[2], grouped=False)
        if len(names) == len(values):
            return Form("tuple", tuple(values), tuple(names), "()")
    parts = _signed(split(text))
    if len(parts) > 1:
        return _list(parts)
    opened = re.match(r"\\\{|[(\[]", text)
    if opened and closing(text, opened.end() - 1) == len(text) - 1:
        inner = text[opened.end() : -len(opened[0])]
        inside = _signed(split(inner, grouped=False))
        if opened[0] == "\\{":
            return Form("set", tuple(inside))
        if len(inside) > 1:
            return Form("tuple", tuple(inside), brackets=text[0] + text[-1])
        if opened[0] == "(" and inside:
            return form(inner.strip())
    if found := _NAMED.fullmatch(text):
        return Form("one", (found[2].strip(),), (found[1],))
    return Form("one", (text,))


def _list(parts: list[str]) -> Form:
    assigned = [_NAMED.fullmatch(part) for part in parts]
    names = tuple(found[1] for found in assigned if found)
    if assigned[0] and len(names) == 1 and not any("=" in part for part in parts[1:]):  # x = 1, 2
        names *= len(parts)
    if len(names) == len(parts) and len(set(names)) in (1, len(parts)):
        values = tuple(found[2].strip() if found else part for found, part in zip(assigned, parts, strict=True))
        return Form("list" if len(set(names)) == 1 else "tuple", values, names)
    return Form("list", tuple(parts))


def _signed(parts: list[str]) -> list[str]:
    """With two parts for one that has a \\pm, outside of braces."""
    signs = (("+", "-"), ("-", "+"))
    return [
        part.replace("\\pm", sign).replace("\\mp", other)
        for part in parts
        for sign, other in (signs if "\\pm" in part and "\\{" not in part else signs[:1])
    ]


def split(text: str, separators: tuple[str, ...] = (",", ";", "\\lor"), grouped: bool = True) -> list[str]:
    """The parts between separators outside of brackets; `grouped` keeps 1,000 in one part."""
    parts, start, depth = [], 0, 0
    for found in (_SIGN if grouped else _UNGROUPED).finditer(text):
        depth += (found[0] in "([{") - (found[0] in ")]}")
        if depth == 0 and found[0] in separators:
            parts.append(text[start : found.start()])
            start = found.end()
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]
