"""Whether two short answers are the same, as far as text and exact numbers decide it; the rest is algebra.py's.

`read` brings an answer into the spelling of spelling.py, `same` compares two. Nothing is rounded: a decimal is the
fraction that it writes out, so 0.3333 is not one third. docs/data.md has the table of what counts as equal.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from string import ascii_lowercase

from verl_krpo.reward.spelling import spelled

MAX_EXPONENT = 4000  # a larger power of ten is left to algebra.py, where what it costs is limited

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)"
_DECIMAL = rf"(?P<decimal>{_DIGITS}(?:\.\d*)?|\.\d+)"
_POWER = r"10 ?\^ ?\{ ?(?P<power>[+-]?\d+) ?\}"
_NUMBERS = [
    re.compile("(?P<sign>[+-]?) ?" + body)
    for body in (
        r"(?P<whole>\d+) (?P<over>\d+) ?/ ?(?P<under>\d+)",
        rf"(?P<over>{_DIGITS}) ?/ ?(?P<under>{_DIGITS})",
        rf"(?P<whole>\d+)? ?\\frac ?\{{(?P<over> ?[+-]? ?{_DIGITS}) ?\}} ?\{{(?P<under> ?[+-]? ?{_DIGITS}) ?\}}",
        rf"{_DECIMAL}(?: ?\\(?:times|cdot) ?{_POWER})?",
        r"(?P<decimal>\d*\.\d*)\\(?:overline|bar) ?\{(?P<repeated>\d+)\}",
        _POWER,
    )
]
_BASED = re.compile(r"(\d[\dA-Z]*) ?(?:_|(?:\\text\{)? ?(?=base))\{?(?:\\text\{)? ?(?:base)? ?\}? ?(\d+) ?\}*")
_PERCENT = re.compile(r"([^%]*?) ?(?:\\?%|\\text\{ ?percent(?:age)? ?\}|percent(?:age)?)")
_CLOCK = re.compile(r"\d{1,2}:[0-5]\d(?::[0-5]\d)?")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")

# Words after a number are its unit and go. Only these are compared, where both sides have one.
_UNITS = {
    name: names.split()[0]
    for names in (
        "mm millimeter millimeters millimetre millimetres",
        "cm centimeter centimeters centimetre centimetres",
        "m meter meters metre metres",
        "km kilometer kilometers kilometre kilometres",
        "in inch inches",
        "ft foot feet",
        "mg milligram milligrams",
        "g gram grams",
        "kg kilogram kilograms",
        "s sec second seconds",
        "min minute minutes",
        "h hr hour hours",
        "day days",
        "cent cents",
        "dollar dollars",
        "mph",
        "a.m am",
        "p.m pm",
    )
    for name in names.split()
}
_UNIT = re.compile(
    r"(?P<value>.*(?:[\d})]|\\pi))(?P<space> ?)(?P<name>\\text\{[^{}\d]*[a-zA-Z][^{}\d]*\}|[a-zA-Z][a-zA-Z. /]*)"
    r"(?P<power>\^\{\d\})?"
)


@dataclass(frozen=True)
class Answer:
    """An answer in one spelling.

    latex    without dollar signs, unit, percent sign and base
    number   its value where it is a plain number, else None
    words    whether it is words, to which no algebra applies
    """

    latex: str
    number: Fraction | None = None
    words: bool = False
    unit: str = ""
    percent: bool = False
    base: int = 10


def read(text: str) -> Answer:
    """Bring an answer into one spelling."""
    if (value := number(text)) is not None:
        return Answer(text, value)
    latex = spelled(text)
    if found := _BASED.fullmatch(latex):
        if int(found[2]) != 10:
            return Answer(found[1].lstrip("0"), base=int(found[2]))
        latex = found[1]
    unit = ""
    percent = _PERCENT.fullmatch(latex)
    latex = percent[1] if percent else latex
    if (found := _UNIT.fullmatch(latex)) and _is_unit(found):
        latex, unit = found["value"], _UNITS.get(_name(found), "") + (found["power"] or "")
    value = number(latex)
    return Answer(latex, value, value is None and _is_words(latex), unit, percent is not None)


def number(latex: str) -> Fraction | None:
    """The value of a plain number: -1,000.5, 1 000, 1/2, \\frac{1}{2}, 3 1/2, 0.1\\overline{6}, 4.5\\times 10^{3}."""
    return next((_value(found) for pattern in _NUMBERS if (found := pattern.fullmatch(latex))), None)


def _value(found: re.Match) -> Fraction | None:
    part = {name: re.sub("[, ]", "", text) for name, text in found.groupdict().items() if text}
    exponent, under = int(part.get("power", 0)), int(part.get("under", 1))
    if abs(exponent) > MAX_EXPONENT or not under:
        return None
    value = int(part.get("whole", 0)) + Fraction(int(part["over"]), under) if "over" in part else Fraction(1)
    if "decimal" in part:
        whole, _, digits = part["decimal"].partition(".")
        value = Fraction(f"{whole or 0}.{digits or 0}")
        if repeated := part.get("repeated"):
            value += Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(digits))
    value *= Fraction(10) ** exponent
    return -value if part.get("sign") == "-" else value


def _name(found: re.Match) -> str:
    return _TEXT.sub(r"\1", found["name"]).strip(" .").lower()


def _is_unit(found: re.Match) -> bool:
    """`5 m`, `5cm`, `5\\text{ apples}`, `5 apples`, `\\sqrt{2} cm`; but `5m`, `5xy` and `2 x` are products."""
    name, text = _name(found), found["name"].startswith("\\text")
    apart = text or bool(found["space"])
    if name in _UNITS:
        return apart or len(name) > 1
    if text:  # after a value without letters of its own
        return not re.search("[a-zA-Z]", re.sub(r"\\(?!text)[a-zA-Z]+", "", found["value"]))
    return apart and len(name) > 3 and number(found["value"]) is not None


def _is_words(latex: str) -> bool:
    """`\\text{no}`, `June 20`; but `\\frac{abcd}{2}`, `\\text{if } x > 0` and the product `abcd` are not words."""
    if latex.isalpha() and "".join(sorted(latex)) in ascii_lowercase:
        return False  # letters that follow one another in the alphabet are variables
    written = re.search(r"(?<!\d)(?<!\d )\\text\{[^{}]*[a-zA-Z]{2}|(?<![a-zA-Z\\])[a-zA-Z]{4,}", latex)
    return written is not None and not re.search(r"[\\^_=+<>{}|]", _TEXT.sub(r"\1", latex))


def _plain(latex: str) -> str:
    return re.sub(r"(?:[\s,'\"\\]|[.-](?!\d))+", " ", _TEXT.sub(r"\1", latex)).strip().lower()


def same(answer: Answer, truth: Answer) -> bool | None:
    """Whether two answers are the same; None where algebra must decide."""
    if answer.base != truth.base:
        return False
    if answer.unit and truth.unit and answer.unit != truth.unit:
        return False
    if answer.words or truth.words:
        return _plain(answer.latex) == _plain(truth.latex)
    if _closed(answer.latex) == _closed(truth.latex):
        return bool(truth.latex)
    if answer.base != 10:
        return False
    if ":" in answer.latex + truth.latex and (verdict := _same_ratio(answer.latex, truth.latex)) is not None:
        return verdict
    if answer.number is None or truth.number is None:
        return None
    # A percent sign may be missing on one side, or be reckoned in.
    parts = [value.number / 100 if value.percent else value.number for value in (answer, truth)]
    return answer.number == truth.number or answer.percent != truth.percent and parts[0] == parts[1]


def _same_ratio(answer: str, truth: str) -> bool | None:
    """Whether two ratios of numbers are: 2:4 and 1:2, 3:4 and 3/4. What may be a clock, 2:20, is no quotient."""
    sides = [[number(part.strip()) for part in side.split(":")] for side in (answer, truth)]
    if any(value is None for side in sides for value in side):
        return None
    ours, theirs = sides
    if _CLOCK.fullmatch(answer) or _CLOCK.fullmatch(truth):
        return ours == theirs
    if len(ours) != len(theirs):
        ours, theirs = ([*side, Fraction(1)] if len(side) == 1 else side for side in sides)
    return (
        len(ours) == len(theirs)
        and any(ours) == any(theirs) is True
        and all(ours[i] * theirs[j] == ours[j] * theirs[i] for i, j in combinations(range(len(ours)), 2))
    )


def _closed(latex: str) -> str:
    """Without spaces, but for those between digits."""
    return re.sub(r"(?<!\d) | (?!\d)", "", latex)


def exact(latex: str) -> str:
    """An expression for algebra without rounding: decimals are written as fractions, thousands without separators."""
    latex = re.sub(r"([(\[][^()\[\]]*\d),(?=\d)", r"\1, ", latex)  # in brackets a comma separates
    latex = _THOUSANDS.sub(lambda found: re.sub("[, ]", "", found[0]), latex)
    return _DECIMALS.sub(_fraction, latex)


def _fraction(decimal: re.Match) -> str:
    over, under = _value(decimal).as_integer_ratio()
    return f"{{\\frac{{{over}}}{{{under}}}}}"


_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?: \d{3})+|(?:,\d{3})+)(?!,?\d)")
_DECIMALS = re.compile(
    r"(?<![\w.])(?P<decimal>\d*\.\d+|\d+\.(?=\\(?:over|bar)))"
    r"(?:\\(?:overline|bar) ?\{(?P<repeated>\d+)\})?(?![\d.])"
)
