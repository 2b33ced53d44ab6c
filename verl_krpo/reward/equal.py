"""Whether two short answers are the same, as far as text and exact numbers decide it; the rest is algebra.py's.

`read` brings an answer into one spelling, `same` compares two. Nothing is rounded: a decimal is the fraction that it
writes out, so 0.3333 is not one third. docs/data.md has the table of what counts as equal.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_EXPONENT = 4000  # a larger power of ten is left to algebra.py, where what it costs is limited

_CHARACTERS = {
    "\u2212": "-", "\u2013": "-", "\u00d7": "\\times ", "\u00b7": "\\cdot ", "\u22c5": "\\cdot ", "\u00f7": "/",
    "\u03c0": "\\pi ", "\u221e": "\\infty ", "\u2264": "\\le ", "\u2265": "\\ge ", "\u2260": "\\ne ", "\u2208": "\\in ",
    "\u00b1": "\\pm ", "\u222a": "\\cup ", "\u2205": "\\emptyset ", "\u00b0": "\\degree ", "\u221a": "sqrt ",
    "\u00bd": "\\frac{1}{2}", "\u00bc": "\\frac{1}{4}", "\u00be": "\\frac{3}{4}",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\uff0c": ", ",
}  # fmt: skip
_RAISED = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")

# What is written in several ways -> one spelling, in this order.
_SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        # signs that mean nothing
        (r"(?<!\\)\\[()\[\]]|\\?\$|\\displaystyle|\\(?:left|right|[bB]igg?[lr]?)(?![a-z])\.?|(?<!\\)\\!\s*", ""),
        (r"\{,\}", ","),
        (r"(?<!\\)\\[,;: ]|\\(?:q?quad|thinspace|space)(?![a-zA-Z])|(?<!\\)~|\s+", " "),
        (r" *\^ *(?:\\circ|\{ *\\circ *\})|\\degrees?(?![a-z])", ""),
        # LaTeX
        (r"\\[dtc]frac(?![a-z])", r"\\frac"),
        (r"\\(?:text(?:bf|it|rm|sf|normal)|math(?:bf|it|rm|sf)|mbox|operatorname)\s*\{", r"\\text{"),
        (r"\\text\{ *([-+]?[\d.,]*\d) *\}", r"\1"),
        (r"\\varnothing(?![a-z])|\\\{ *\\\}", r"\\emptyset "),
        (r"\\leq(?:slant)?(?![a-z])|<=", r"\\le "),
        (r"\\geq(?:slant)?(?![a-z])|>=", r"\\ge "),
        (r"\\neq(?![a-z])|!=", r"\\ne "),
        (r"\\lbrace(?![a-z])", r"\\{"),
        (r"\\rbrace(?![a-z])", r"\\}"),
        (r",? ?(?:\\text\{\s*(?:or|and)\s*\}|(?<![a-zA-Z\\])(?:or|and)(?![a-zA-Z])) ?", ", "),
        # plain text
        (r"\*\*", "^"),
        (r"(?<![a-zA-Z\\])sqrt *(\d+)", r"\\sqrt{\1}"),
        (r"(?<![a-zA-Z\\])(pi|sqrt)(?![a-zA-Z])", r"\\\1 "),
        (r"(?<![a-zA-Z\\])inf(?:ini)?ty(?![a-zA-Z])", r"\\infty "),
        (r"(?<![a-zA-Z\\])((?:arc)?(?:sin|cos|tan)|log|ln)(?=[ (^_])", r"\\\1"),
        (r"(?<=\d) ?[x*] ?(?=10 ?\^)", r"\\times "),
        (r"(?<![a-zA-Z\\.\d])(\d[\d,]*\.?\d*|\.\d+)[eE]([+-]?\d+)(?!\w|\.\d)", r"\1\\times 10^{\2}"),
        (r"\*", r"\\cdot "),
        (r"(?<=\d)\.(?![\d\\])", ""),
        # arguments in braces
        (r"\\frac *(\d) *(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac *(\d) *(?=\{)", r"\\frac{\1}"),
        (r"(\\frac *\{[^{}]*\}) *(\d)", r"\1{\2}"),
        (r"\^ *([+-]?\d+)", r"^{\1}"),
        (r"\\sqrt *(\w)", r"\\sqrt{\1}"),
        (r" +", " "),
    ]
]

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
_PERCENT = re.compile(r" ?(?:\\?%|\\text\{ ?percent(?:age)? ?\}|percent(?:age)?)")
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
        "a.m. am",
        "p.m. pm",
    )
    for name in names.split()
}
_UNIT = re.compile(
    r"(?P<value>.*[\d})])(?P<space> ?)(?P<name>\\text\{[^{}]*[a-zA-Z][^{}]*\}|[a-zA-Z][a-zA-Z. /]*)(?P<power>\^\{\d\})?"
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
    latex = spelled(text)
    if found := _BASED.fullmatch(latex):
        if int(found[2]) != 10:
            return Answer(found[1].lstrip("0"), base=int(found[2]))
        latex = found[1]
    unit = ""
    without = _PERCENT.sub("", latex).strip()
    percent, latex = without != latex, without
    if (found := _UNIT.fullmatch(latex)) and _is_unit(found):
        latex, unit = found["value"], _UNITS.get(_name(found), "") + (found["power"] or "")
    value = number(latex)
    return Answer(latex, value, value is None and _is_words(latex), unit, percent)


def spelled(text: str) -> str:
    """The text with one spelling for what LaTeX and plain text write in several ways."""
    for old, new in _CHARACTERS.items():
        text = text.replace(old, new)
    text = re.sub("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+", lambda f: f"^{{{f[0].translate(_RAISED)}}}", text)
    text = text.strip().strip("*")
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return _braced(text).strip().rstrip(".,;:").strip()


def _braced(text: str) -> str:
    """\\sqrt(...) and ^(...) with braces in place of the parentheses."""
    while found := re.search(r"(\\sqrt|\^) *\(", text):
        depth, end = 1, found.end()
        while depth and end < len(text):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        if depth:
            break
        text = f"{text[: found.end(1)]}{{{text[found.end() : end - 1]}}}{text[end:]}"
    return text


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
    return _TEXT.sub(r"\1", found["name"]).strip().lower()


def _is_unit(found: re.Match) -> bool:
    """`5 m`, `5cm`, `5\\text{ apples}`, `5 apples`, `\\sqrt{2} cm`; but `5m`, `5xy` and `2 x` are products."""
    name, text = _name(found), found["name"].startswith("\\text")
    apart = text or bool(found["space"])
    if name in _UNITS:
        return apart or len(name) > 1
    return number(found["value"]) is not None and (text or apart and len(name) > 3)


def _is_words(latex: str) -> bool:
    """`\\text{no}`, `June 20`; but `\\frac{abcd}{2}` and `\\text{if } x > 0` are not words alone."""
    written = re.search(r"\\text\{[^{}]*[a-zA-Z]{2}|(?<![a-zA-Z\\])[a-zA-Z]{4,}", latex)
    return written is not None and not re.search(r"[\\^_=+<>{}|]", _TEXT.sub(r"\1", latex))


def _plain(latex: str) -> str:
    return re.sub(r"(?:[\s,'\"]|[.-](?!\d))+", " ", _TEXT.sub(r"\1", latex)).strip().lower()


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
    if answer.number is None or truth.number is None:
        return None
    # A percent sign may be missing on one side, or be reckoned in.
    parts = [value.number / 100 if value.percent else value.number for value in (answer, truth)]
    return answer.number == truth.number or answer.percent != truth.percent and parts[0] == parts[1]


def _closed(latex: str) -> str:
    """Without spaces, but for those between digits."""
    return re.sub(r"(?<!\d) | (?!\d)", "", latex)


def exact(latex: str) -> str:
    """An expression for algebra without rounding: decimals are written as fractions, thousands without separators."""
    if latex.startswith(("(", "[", "\\{")):
        latex = latex.replace(",", ", ")  # (100,200) is a pair
    latex = re.sub(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)", lambda found: found[0].replace(" ", ""), latex)
    return _DECIMALS.sub(_fraction, latex)


def _fraction(decimal: re.Match) -> str:
    over, under = _value(decimal).as_integer_ratio()
    return f"{{\\frac{{{over}}}{{{under}}}}}"


_DECIMALS = re.compile(
    r"(?<![\w.])(?P<decimal>\d*\.\d+|\d+\.(?=\\(?:over|bar)))"
    r"(?:\\(?:overline|bar) ?\{(?P<repeated>\d+)\})?(?![\d.])"
)
