"""Whether two answers are equal, part by part, by sympy. Runs in the workers of pool.py: it may take for ever.

form.py splits both into parts, latex2sympy2_extended reads a part. Constants are equal if 50 digits are, expressions
with variables if their values are at a few points: all variables are positive, or of any sign where a | is written.
Conditions are equal if they leave the same numbers. Equations are compared by math-verify.
"""

import logging
import random
import re
from collections.abc import Callable
from functools import lru_cache, reduce

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify import verify
from sympy.core.relational import Relational

from verl_krpo.reward.equal import exact, read, same
from verl_krpo.reward.form import Form, form, split

logging.getLogger("math_verify").setLevel(logging.ERROR)

DIGITS = 50  # two constants are equal if that many digits are
_NORMALIZATION = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
_CONVERSION = ConversionConfig(lowercase_symbols=False)
# What the parser takes for a differential, a constant or a function -> a letter that it leaves alone.
_LETTERS = {"d": "\\varsigma ", "I": "\\varpi ", "E": "\\varrho ", "\\gamma": "\\vartheta ", "i": "I "}
_LETTER = re.compile(r"\\(?:text|begin|end) ?\{[^{}]*\}|\\[a-zA-Z]+|[a-zA-Z]")
_OWN = {"d": re.compile(r"\\int(?![a-z])|\\frac\{d.*\}\{ ?d ?[a-z\\]"), "i": re.compile(r"\\(?:sum|prod)(?![a-z])")}
_PRIMED = re.compile(r"([a-zA-Z])('+|\^\{? ?(?:\\prime ?)+\}?)")
_INEQUALITY = re.compile(r"[<>]|\\(?:le|ge|ne)(?![a-z])")
_REGION = re.compile(_INEQUALITY.pattern + r"|\\(?:cup|cap|setminus|mathbb)(?![a-z])")
_BUILT = re.compile(r"\\\{ ?([a-zA-Z]) ?(?:\\in ?\\mathbb\{R\})? ?(?:\\mid|\||:) ?(.*)\\\}")
_LOG = re.compile(r"\\log(?![a-z_]| _)")


class _Parser(_Latex2Sympy):
    """With exact numbers, and nearly twice as fast: latex2sympy has sympy read every number as an expression.

    The class is a private one of the version that math-verify pins.
    """

    def parse_number(self, text: str) -> sympy.Rational:
        return sympy.Rational(text.replace(",", ""))


def equal(answer: str, truth: str) -> bool:
    """Whether two texts of equal.read that equal.same leaves open are equal; False where one cannot be parsed."""
    # A logarithm without a base is of base 10 or e, whichever fits, the same on both sides.
    readings = ("\\\\log", "\\\\ln") if _LOG.search(answer + truth) else ("",)
    return any(_equal_forms(_LOG.sub(log, answer), _LOG.sub(log, truth)) for log in readings)


def _equal(answer: str, truth: str) -> bool:
    ours, theirs = read(answer), read(truth)
    verdict = same(ours, theirs)
    return _equal_forms(ours.latex, theirs.latex) if verdict is None else verdict


def _equal_forms(answer: str, truth: str) -> bool:
    if _REGION.search(answer + truth) and (verdict := _tried(_same_regions, answer, truth)) is not None:
        return verdict
    a, t = form(answer), form(truth)
    if (a.kind, t.kind) == ("one", "one"):
        return _same_ones(answer, a, truth, t)
    inside = [side.parts[0] if len(side.parts) == 1 else text for side, text in ((a, answer), (t, truth))]
    if inside != [answer, truth]:  # x = (1, 2), \{2\}
        return _equal(*inside)
    if a.names and t.names and set(a.names) != set(t.names):
        return False
    if "tuple" in (a.kind, t.kind):
        return _same_tuples(a, t)
    return _same_lists(_distinct(a), _distinct(t))


def _same_tuples(a: Form, t: Form) -> bool:
    if len(a.parts) != len(t.parts):
        return False
    if a.names and t.names:
        values = dict(zip(a.names, a.parts, strict=True))
        return all(_equal(values[name], part) for name, part in zip(t.names, t.parts, strict=True))
    if a.kind != t.kind and not (a if a.kind == "tuple" else t).names:
        return False
    if len(a.parts) == 2 and (a.brackets or "()") != (t.brackets or "()"):  # intervals
        return False
    return all(_equal(*parts) for parts in zip(a.parts, t.parts, strict=True))


def _same_lists(ours: list[str], theirs: list[str]) -> bool:
    """In any order; a part is matched once."""
    if len(ours) != len(theirs):
        return False
    for part in theirs:
        match = next((i for i, other in enumerate(ours) if _equal(other, part)), None)
        if match is None:
            return False
        del ours[match]
    return True


def _distinct(parts: Form) -> list[str]:
    if parts.kind != "set":
        return list(parts.parts)
    return reduce(lambda seen, part: seen if any(_equal(part, one) for one in seen) else [*seen, part], parts.parts, [])


def _same_ones(answer: str, a: Form, truth: str, t: Form) -> bool:
    ours, theirs = (split(side, ("=",)) for side in (answer, truth))
    if len(ours) > len(theirs) == 1:  # whatever the answer says that it is, but not x - y = 0 for 0
        return not (ours[-1] == "0" and re.search(".[+-]", ours[0])) and _equal(ours[-1], truth)
    if a.names == t.names or len(ours) == 1:
        if a.parts != (answer,) or t.parts != (truth,):
            return _equal(a.parts[0], t.parts[0])
    ratios = [split(side, (":",)) for side in (answer, truth)]
    if len(ratios[0]) == len(ratios[1]) > 1:
        return all(_equal(*parts) for parts in zip(*ratios, strict=True))
    if ":" in answer + truth:
        return False
    parsed = [_parsed(side) for side in (answer, truth)]
    return None not in parsed and _same(*parsed, positive="|" not in answer + truth)


@lru_cache(maxsize=16)  # a truth comes again with each response
def _parsed(latex: str) -> sympy.Basic | sympy.MatrixBase | None:
    latex = _PRIMED.sub(lambda found: found[1] + "_{" + "q" * len(re.findall("'|prime", found[2])) + "}", exact(latex))
    kept = {letter for letter, pattern in _OWN.items() if pattern.search(latex)}
    latex = _LETTER.sub(lambda found: found[0] if found[0] in kept else _LETTERS.get(found[0], found[0]), latex)
    return _tried(_read, latex)


def _read(latex: str) -> sympy.Basic | sympy.MatrixBase:
    return _Parser(is_real=True, config=_CONVERSION).parse(normalize_latex(latex, _NORMALIZATION))


def _tried(call: Callable, *arguments):
    """What the call returns, None where sympy or its parser cannot do it and say so in one of their many ways."""
    try:
        return call(*arguments)
    except MemoryError:
        raise
    except Exception:
        return None


def _same(answer: sympy.Basic | sympy.MatrixBase, truth: sympy.Basic | sympy.MatrixBase, positive: bool) -> bool:
    if isinstance(answer, sympy.MatrixBase) and isinstance(truth, sympy.MatrixBase):
        return answer.shape == truth.shape and all(_same(*pair, positive) for pair in zip(answer, truth, strict=True))
    if isinstance(answer, sympy.Expr) and isinstance(truth, sympy.Expr):
        answer, truth = answer.doit(), truth.doit()
        if answer.has(sympy.zoo, sympy.nan) or truth.has(sympy.zoo, sympy.nan):
            return False
        symbols = sorted(answer.free_symbols | truth.free_symbols, key=str)
        if not symbols:
            return _same_constant(answer, truth)
        if answer == truth:
            return True
        verdict = _tried(_same_values, answer, truth, symbols, positive)
        if verdict is not None:
            return verdict
    return _tried(_verified, answer, truth) is True


def _verified(answer: sympy.Basic | sympy.MatrixBase, truth: sympy.Basic | sympy.MatrixBase) -> bool:
    return verify(truth, answer, numeric_precision=1000, timeout_seconds=None, raise_on_error=True)


def _same_values(answer: sympy.Expr, truth: sympy.Expr, symbols: list[sympy.Symbol], positive: bool) -> bool | None:
    """Whether both have the same value wherever they are tried; None where one of them has none, or it is zero."""
    draw, signs = random.Random(0), (1,) if positive else (1, -1)
    for _ in range(4 if positive else 8):
        point = {
            symbol: sympy.Rational(draw.randint(100, 999) * draw.choice(signs), draw.choice((17, 97, 997)))
            for symbol in symbols
        }
        a, t = (side.xreplace(point).evalf(DIGITS + 10) for side in (answer, truth))
        if not a.is_number or not t.is_number or a.has(sympy.zoo, sympy.nan, sympy.oo) or 0 in (a, t):
            return None
        if not _close(a, t):
            return False
    return True


def _same_constant(answer: sympy.Expr, truth: sympy.Expr) -> bool:
    if answer == truth or answer.is_Rational and truth.is_Rational:
        return bool(answer == truth)
    a, t = answer.evalf(DIGITS + 10), truth.evalf(DIGITS + 10)
    if not a.is_finite or not t.is_finite:
        return False
    if 0 in (a, t):
        return (answer - truth).equals(0) is True
    return _close(a, t)


def _close(a: sympy.Expr, t: sympy.Expr) -> bool:
    return bool(abs(a - t) <= sympy.Float(10, DIGITS) ** -DIGITS * abs(t))


def _same_regions(answer: str, truth: str) -> bool | None:
    """Whether two conditions leave the same numbers; None where one is no condition on one variable, or none is met."""
    ours, theirs = _region(answer), _region(truth)
    if ours is None or theirs is None:
        return None
    (a, name), (t, other) = ours, theirs
    if a.is_empty and t.is_empty:
        return None
    if name and other and name != other:
        return False
    return a == t or a.symmetric_difference(t).is_empty is True


def _region(text: str) -> tuple[sympy.Set, set[str]] | None:
    """The numbers that conditions on one variable leave, and the variable: or joins them, a comma meets them."""
    if found := _BUILT.fullmatch(text):
        text = found[2]
    if len(some := split(text, ("\\lor",))) > 1:
        return _combined(sympy.Union, some)
    if len(every := split(text, (",", ";"))) > 1:
        return _combined(sympy.Intersection, every) if _INEQUALITY.search(text) else None
    parsed = _parsed(re.sub(r"^[a-zA-Z] ?\\in(?![a-z])", "", text).strip())
    if isinstance(parsed, sympy.Set) and not parsed.has(Relational):
        return parsed.doit(), set()
    if isinstance(parsed, Relational | sympy.And) and len(parsed.free_symbols) == 1 and not parsed.has(sympy.Set):
        return parsed.as_set(), {str(symbol) for symbol in parsed.free_symbols}
    return None


def _combined(combine: type[sympy.Set], parts: list[str]) -> tuple[sympy.Set, set[str]] | None:
    regions = [_region(part) for part in parts]
    if any(region is None for region in regions):
        return None
    sets, names = zip(*regions, strict=True)
    return (combine(*sets), set().union(*names)) if len(set().union(*names)) == 1 else None
