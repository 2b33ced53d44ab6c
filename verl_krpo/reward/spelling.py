"""One spelling for what LaTeX and plain text write in several ways: tables, applied from the top down."""

import re

_CHARACTERS = {
    "\u2212": "-", "\u2013": "-", "\u00d7": "\\times ", "\u00b7": "\\cdot ", "\u22c5": "\\cdot ", "\u00f7": "/",
    "\u03c0": "\\pi ", "\u221e": "\\infty ", "\u2264": "\\le ", "\u2265": "\\ge ", "\u2260": "\\ne ", "\u2208": "\\in ",
    "\u00b1": "\\pm ", "\u222a": "\\cup ", "\u2205": "\\emptyset ", "\u00b0": "\\degree ", "\u221a": "sqrt ",
    "\u00bd": "\\frac{1}{2}", "\u00bc": "\\frac{1}{4}", "\u00be": "\\frac{3}{4}", "\u211d": "\\mathbb{R}",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\uff0c": ", ", "\uff1a": ":",
}  # fmt: skip
_RAISED = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")

_BARE = r"(?<![a-zA-Z\\])"  # before a word that is no command
_FUNCTION = r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln"
_CALLED = r"exp|min|max|gcd|lcm"  # functions only with an argument in parentheses: `5 min` is a time
_GREEK = (
    "alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|upsilon|phi|chi|psi|omega"
)

_SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        # signs that mean nothing
        (r"(?<!\\)\\[()\[\]]|\\?\$|\\displaystyle|\\(?:left|right|[bB]igg?[lr]?)(?![a-z])\.?|(?<!\\)\\!\s*", ""),
        (r"\\textcolor(?![a-z]) *\{[^{}]*\}|\\color(?![a-z]) *\{[^{}]*\}", ""),
        (r"\\(?:bm|boldsymbol|pmb|underline|vec|overrightarrow|(?:wide)?hat)(?![a-z]) *(?:\{([^{}]*)\})?", r" \1"),
        (r"(?:\\text)?\{ *([,:]) *\}", r"\1"),
        (r"(?<!\\)\\[,;: ]|\\(?:q?quad|thinspace|space)(?![a-zA-Z])|(?<!\\)~|\s+", " "),
        (r" *\^ *(?:\\circ|\{ *\\circ *\})|\\degrees?(?![a-z])", ""),
        # LaTeX
        (r"\\[dtc]frac(?![a-z])", r"\\frac"),
        (r"\\[dt]binom(?![a-z])", r"\\binom"),
        (r"\{([^{}]*)\\choose(?![a-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\\[lc]?dots(?![a-z])", "..."),
        (r"\\(?:text(?:bf|it|rm|sf|normal)?|math(?:bf|it|rm|sf)|mbox|operatorname\*?)\s*\{", r"\\text{"),
        (r"\\text\{ *([-+]?[\d.,]*\d) *\}", r"\1"),
        (r"_ ?(?:\{ ?\\text\{ *(\w+) *\} ?\}|\\text\{ *(\w+) *\}|\{? ?\\(max|min) ?\}?)", r"_{\1\2\3}"),
        (r"\\text\{ *([eid]) *\}", r"\1"),
        (r"\\(?:imath|imaginaryI)(?![a-zA-Z])", "i"),
        (r"\\exponentialE(?![a-zA-Z])", "e"),
        (rf"\\text\{{ *({_FUNCTION}|{_CALLED}) *\}}", r"\\\1 "),
        (r"\\var(epsilon|phi|theta|rho|sigma)(?![a-z])", r"\\\1"),
        (r"\\mathbb *([A-Z])", r"\\mathbb{\1}"),
        (r"\\varnothing(?![a-z])|\\\{ *\\\}", r"\\emptyset "),
        (r"\\langle(?![a-z])", "("),
        (r"\\rangle(?![a-z])", ")"),
        (r"\\[lr]?vert(?![a-z])", "|"),
        (r"\\leq(?:slant)?(?![a-z])|<=", r"\\le "),
        (r"\\geq(?:slant)?(?![a-z])|>=", r"\\ge "),
        (r"\\lg(?![a-z])", r"\\log_{10}"),
        (r"\\lt(?![a-z])", "<"),
        (r"\\gt(?![a-z])", ">"),
        (r"\\neq(?![a-z])|!=", r"\\ne "),
        (r"\\lbrace(?![a-z])", r"\\{"),
        (r"\\rbrace(?![a-z])", r"\\}"),
        (rf",? ?(?:\\text\{{\s*and\s*\}}|{_BARE}and(?![a-zA-Z])|\\(?:land|wedge)(?![a-z])) ?", ", "),
        (rf",? ?(?:\\text\{{\s*or\s*\}}|{_BARE}or(?![a-zA-Z])|\\(?:lor|vee)(?![a-z])) ?", r" \\lor "),
        # plain text
        (r"\*\*", "^"),
        (rf"{_BARE}sqrt *(\d+)", r"\\sqrt{\1}"),
        (rf"{_BARE}(pi|sqrt)(?![a-zA-Z])", r"\\\1 "),
        (rf"{_BARE}(?:inf(?:ini)?ty|oo)(?![a-zA-Z])", r"\\infty "),
        (rf"{_BARE}a((?:sin|cos|tan)h?)(?=[ (^])", r"\\arc\1"),
        (rf"{_BARE}cbrt *(?=\()", r"\\sqrt[3]"),
        (rf"{_BARE}log(2|10) *(?=\()", r"\\log_{\1}"),
        (rf"{_BARE}factorial *\((\w+)\)", r"\1!"),
        (rf"{_BARE}abs *\(([^()]*)\)", r"|\1|"),
        (rf"{_BARE}(?:C|binom|comb) *\((\w+), *(\w+)\)", r"\\binom{\1}{\2}"),
        (rf"{_BARE}((?:{_FUNCTION})(?=[ (^_])|(?:{_CALLED})(?=\())", r"\\\1"),
        (rf"{_BARE}({_GREEK})(?![a-zA-Z])", r"\\\1 "),
        (r"(?<=\d) ?[x*] ?(?=10 ?\^)", r"\\times "),
        (r"(?<![a-zA-Z\\.\d])(\d[\d,]*\.?\d*|\.\d+)[eE]([+-]?\d+)(?!\w|\.\d)", r"\1\\times 10^{\2}"),
        (r"\*", r"\\cdot "),
        (r"(?<=\d)\.(?![\d\\])", ""),
        # arguments in braces
        (r"\\frac *(\d) *(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac *(\d) *(?=\{)", r"\\frac{\1}"),
        (r"(\\frac *\{[^{}]*\}) *(\d)", r"\1{\2}"),
        (r"\^ *([+-]?\d+)", r"^{\1}"),
        (r"\\binom *(\w) *(\w)", r"\\binom{\1}{\2}"),
        (r"\\sqrt *(\w)", r"\\sqrt{\1}"),
        (r" +", " "),
        (r", ?(?:\\text\{[^{}]*\} ?)?[a-z] ?\\in ?\\mathbb\{[NZ]\}$", ""),
        (r"^ ?[=:] ?", ""),
    ]
]
_WRAPPED = re.compile(r"(\\text)?\{")


def spelled(text: str) -> str:
    """The text in that spelling. Spelling it again changes nothing."""
    for old, new in _CHARACTERS.items():
        text = text.replace(old, new)
    text = re.sub("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+", lambda f: f"^{{{f[0].translate(_RAISED)}}}", text)
    text = text.strip().strip("*")
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    text = _braced(text).strip().rstrip(".,;:").strip()
    while found := _WRAPPED.match(text):
        if (
            closing(text, found.end() - 1) != len(text) - 1
            or found[1]
            and not re.search(r"[\\/^]", text[found.end() :])
        ):
            break
        text = text[found.end() : -1].strip()
    return text


def _braced(text: str) -> str:
    """\\sqrt(...) and ^(...) with braces in place of the parentheses."""
    while found := re.search(r"(\\sqrt(?:\[\d+\])?|\^) *\(", text):
        end = closing(text, found.end() - 1)
        if end is None:
            break
        text = f"{text[: found.end(1)]}{{{text[found.end() : end]}}}{text[end + 1 :]}"
    return text


def closing(text: str, start: int) -> int | None:
    """Where the bracket at `start` closes, whatever its kind, as intervals mix them; None if it never does."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] in "([{") - (text[at] in ")]}")
        if not depth:
            return at
    return None
