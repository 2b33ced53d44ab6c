"""Whether two expressions are equal, by math-verify and sympy. Runs in the workers of pool.py: it may take for ever."""

import logging

import sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

logging.getLogger("math_verify").setLevel(logging.ERROR)

DIGITS = 50  # two constants are equal if that many digits are
_CONFIG = (LatexExtractionConfig(normalization_config=NormalizationConfig(malformed_operators=True, nits=True)),)


def equal(answer: str, truth: str) -> bool:
    """Whether two LaTeX expressions (of `equal.exact`) are equal; False where one of them cannot be parsed."""
    return any(_same(a, t) for t in _parsed(truth) for a in _parsed(answer))


def _parsed(latex: str) -> list:
    return parse("\\boxed{" + latex + "}", _CONFIG, fallback_mode="no_fallback", parsing_timeout=None)


def _same(answer: sympy.Basic | sympy.MatrixBase, truth: sympy.Basic | sympy.MatrixBase) -> bool:
    answer, truth = _solutions(answer), _solutions(truth)
    if isinstance(answer, sympy.Expr) and isinstance(truth, sympy.Expr):
        if not answer.free_symbols and not truth.free_symbols:
            return _same_constant(answer.doit(), truth.doit())
    try:
        return verify(
            truth,
            answer,
            numeric_precision=1000,
            allow_set_relation_comp=True,
            timeout_seconds=None,
            raise_on_error=True,
        )
    except MemoryError:
        raise
    except Exception:  # sympy's many ways to say that it cannot compare a matrix with a set
        return False


def _solutions(expression):
    """x < -1, x > 1 is the set of all such x."""
    if isinstance(expression, sympy.FiniteSet) and all(_is_inequality(part) for part in expression.args):
        return sympy.Union(*(part.as_set() for part in expression.args))
    return expression


def _is_inequality(expression) -> bool:
    return (
        isinstance(expression, sympy.core.relational.Relational | sympy.And)
        and not isinstance(expression, sympy.Eq)
        and len(expression.free_symbols) == 1
    )


def _same_constant(answer: sympy.Expr, truth: sympy.Expr) -> bool:
    if answer == truth or answer.is_Rational and truth.is_Rational:
        return bool(answer == truth)
    a, t = answer.evalf(DIGITS + 10), truth.evalf(DIGITS + 10)
    if not a.is_finite or not t.is_finite:
        return False
    if 0 in (a, t):
        return (answer - truth).equals(0) is True
    return bool(abs(a - t) <= sympy.Float(10, DIGITS) ** -DIGITS * abs(t))
