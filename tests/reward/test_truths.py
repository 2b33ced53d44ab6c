"""A truth of each benchmark's kind is equal to itself and to its usual spellings. The truths are made up."""

import re
from fractions import Fraction

import pytest

from verl_krpo.reward import math as reward

TRUTHS = {
    "aime": ["0", "7", "033", "204", "999"],
    "amc": ["27.0", "45", "-36", "0.5", "3159"],
    "math500": [
        r"\frac{14}{3}", r"p - q", r"\left( 3, \frac{\pi}{2} \right)", r"3\sqrt{13}", r"\text{Eve}", r"6 - 5i",
        r"90^\circ", r"\frac{\sqrt{3}}{2}", r"\text{(C)}", r"x^3 + 3x - 6", r"[-2,7]", r"(-\infty,0)\cup(0,\infty)",
        r"11,\! 111", r"1\frac{4}{5}", r"2516_8", r"5.4 \text{ cents}", r"\$32{,}348", r"10\%", r"1,-2", r"3:2",
        r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"y = 2x + 3", r"0.\overline{4}", r"\pm 3", r"2^{12}",
        r"144 \text{ square feet}", r"-\frac{35}{9}",
    ],
    "minerva": [
        "4.5e33", "3e6", "1e-3", "2.75e11", "-1.6e-19", "0.36", "7.25", "1./3", r"\frac{m g}{k}", r"e^{-t/\tau}",
        r"\arctan{x}", r"I_0 R e^{-t}", r"6.9\times 10^{8} \text{ cm}", "20000",
    ],
    "olympiadbench": [
        r"2^{1009}", r"8 \%", r"\frac{1}{2}, -3", r"(1,2), (2,1)", r"n(n+1)/2", r"\frac{7}{2}, 2", r"2 \sqrt{7} + 1",
        r"45^{\circ}", r"1 \pm \sqrt{19}", r"f(x) = x", r"\left[\frac{1}{4}, 1\right)", r"k = 2020!", r"2n-1",
        r"\binom{2n}{n}", r"10^{12}",
    ],
}  # fmt: skip


def spellings(truth: str) -> set[str]:
    """How models write it."""
    found = {truth, f"${truth}$", f"\\({truth}\\)", f"{truth}.", truth.replace("\\frac", "\\dfrac")}
    found |= {re.sub(r"\\left|\\right", "", truth), truth.replace("\\text", "\\mathrm"), truth.replace(", ", ",\\,")}
    found.add(re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"{\1/\2}", truth))
    if scientific := re.fullmatch(r"(.*)e(-?\d+)", truth):
        mantissa, power = scientific.groups()
        found |= {f"{mantissa} \\times 10^{{{power}}}", f"{mantissa}\\cdot10^{{{power}}}", f"{mantissa}*10^{power}"}
    if re.fullmatch(r"-?\d+", truth):
        grouped = f"{int(truth):,}"
        found |= {grouped, grouped.replace(",", "{,}"), grouped.replace(",", "\\,"), f"{truth}.0", f"x = {truth}"}
        found |= {f"{truth}\\text{{ units}}", f"\\text{{{truth}}}", f"\\mathbf{{{truth}}}"}
    if re.fullmatch(r"-?\d*\.\d+", truth):
        over, under = Fraction(truth).as_integer_ratio()
        found |= {f"\\frac{{{over}}}{{{under}}}", f"{truth}0"}
    return found


@pytest.mark.parametrize("benchmark", TRUTHS)
def test_a_truth_is_equal_to_its_spellings(benchmark):
    graded = {
        (truth, answer): reward.compute_score(benchmark, f"<answer>{answer}</answer>", truth)["score"]
        for truth in TRUTHS[benchmark]
        for answer in spellings(truth)
    }
    assert [pair for pair, score in graded.items() if score != 1] == []


@pytest.mark.parametrize("benchmark", TRUTHS)
def test_no_truth_is_equal_to_another(benchmark):
    truths = TRUTHS[benchmark]
    pairs = zip(truths, truths[1:] + truths[:1], strict=True)
    assert [p for p in pairs if reward.compute_score(benchmark, f"<answer>{p[0]}</answer>", p[1])["score"]] == []
