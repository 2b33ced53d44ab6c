import random
import threading
from concurrent.futures import ThreadPoolExecutor

import processes
import pytest
from verl.utils.import_utils import load_extern_object

from verl_krpo.reward import answer_tag
from verl_krpo.reward import math as reward
from verl_krpo.reward.pool import Pool

RIGHT, WRONG, NONE = (1.0, 1.0), (0.0, 1.0), (0.0, 0.0)  # (score, format)

# (response, ground truth, (score, format))
ANSWERS = [
    # where the answer stands
    ("So \\boxed{46}.", "46", RIGHT),
    ("$\\boxed{46}$", "46", RIGHT),
    ("#### 46", "46", RIGHT),
    ("a\n#### 46\nmore", "46", RIGHT),
    ("#### 1\n#### 46", "46", RIGHT),
    ("<answer>46</answer>", "46", RIGHT),
    ("<think>\\boxed{1}</think><answer>46</answer>", "46", RIGHT),
    ("<answer> 46 </answer>", "46", RIGHT),
    ("<answer>$\\boxed{46}$</answer>", "46", RIGHT),
    ("<answer>1</answer> no, <answer>46</answer>", "46", RIGHT),
    ("\\boxed{1} no, \\boxed{46}", "46", RIGHT),
    ("\\boxed{46} no, \\boxed{1}", "46", WRONG),
    ("\\boxed{\\boxed{46}}", "46", RIGHT),
    ("\\boxed{ 46 }", "46", RIGHT),
    ("\\boxed 46", "46", RIGHT),
    ("\\fbox{46}", "46", RIGHT),
    ("\\boxed{46} and so \\boxed{4", "46", NONE),
    ("\\boxed{46} or \\boxed{\\frac{1}{2}", "46", NONE),
    ("\\boxed{4 so \\boxed{46}", "46", RIGHT),
    ("\\boxed{46} {", "46", RIGHT),
    ("<answer>\\boxed{46} or \\boxed{4</answer>", "46", NONE),
    # thinking
    ("<think> maybe \\boxed{46}", "46", NONE),
    ("<think> maybe \\boxed{46}</think> I do not know.", "46", NONE),
    ("maybe \\boxed{46}</think> I do not know.", "46", NONE),
    ("<think>\\boxed{1}</think> \\boxed{46}", "46", RIGHT),
    ("\\boxed{1}</think>\n#### 46", "46", RIGHT),
    ("<think>1</think> \\boxed{46} <think> or \\boxed{1}", "46", RIGHT),
    ("<think><answer>46</answer>", "46", NONE),
    # in words
    ("Answer: 46", "46", RIGHT),
    ("So:\n**Final Answer:** $46$", "46", RIGHT),
    ("Answer: 1\nNo.\nAnswer: 46", "46", RIGHT),
    ("Answer: 46. It is \\boxed{1}", "46", WRONG),
    ("My answer: 46", "46", NONE),
    ("#### Final Answer: 46", "46", RIGHT),
    ("#### The answer is 46.", "46", RIGHT),
    ("<answer>So the answer is 46</answer>", "46", RIGHT),
    ("<Answer>46</ANSWER>", "46", RIGHT),
    ("\\boxed{=46}", "46", RIGHT),
    # end tokens
    ("#### 46</s>", "46", RIGHT),
    ("#### 46<|im_end|>\n<|endoftext|>", "46", RIGHT),
    ("#### 46<end_of_turn>", "46", RIGHT),
    # truths as they come
    ("\\boxed{46}", "#### 46", RIGHT),
    ("\\boxed{46}", "2 * 23 = 46\n#### 46", RIGHT),
    ("\\boxed{46}", "$\\boxed{46}$", RIGHT),
    ("\\boxed{46}", "The answer is 46.", RIGHT),
    ("\\boxed{2}", "2 * 23 = 46\n#### 46", WRONG),
    ("<answer>46", "46", NONE),
    ("\\boxed{46", "46", NONE),
    ("46", "46", NONE),
    ("", "46", NONE),
    ("The answer is 46.", "46", NONE),
    ("\\boxed{}", "46", WRONG),
    ("<answer></answer>", "46", WRONG),
    ("####", "46", WRONG),
    ("</answer>46<answer>", "46", NONE),
    # numbers
    ("\\boxed{1,000}", "1000", RIGHT),
    ("\\boxed{1{,}000}", "1000", RIGHT),
    ("#### 1,234,567", "1234567", RIGHT),
    ("#### $1,000", "1000", RIGHT),
    ("\\boxed{46.0}", "46", RIGHT),
    ("\\boxed{046}", "46", RIGHT),
    ("\\boxed{.5}", "0.5", RIGHT),
    ("\\boxed{46.}", "46", RIGHT),
    ("\\boxed{\u22125}", "-5", RIGHT),
    ("\\boxed{-5}", "5", WRONG),
    ("\\boxed{5}", "-5", WRONG),
    ("\\boxed{+5}", "5", RIGHT),
    ("\\boxed{2^{10}}", "1024", RIGHT),
    ("\\boxed{" + "9" * 900 + "}", "9" * 900, RIGHT),
    ("\\boxed{0.3333}", "\\frac{1}{3}", WRONG),
    ("\\boxed{3.14159}", "\\pi", WRONG),
    # fractions and roots
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", RIGHT),
    ("\\boxed{\\frac12}", "\\frac{1}{2}", RIGHT),
    ("\\boxed{\\dfrac{1}{2}}", "0.5", RIGHT),
    ("\\boxed{1/2}", "\\frac{1}{2}", RIGHT),
    ("\\boxed{\\frac{2}{4}}", "\\frac{1}{2}", RIGHT),
    ("\\boxed{-\\frac{1}{2}}", "\\frac{-1}{2}", RIGHT),
    ("\\boxed{3\\frac{1}{2}}", "\\frac{7}{2}", RIGHT),
    ("\\boxed{\\frac{1}{3}}", "\\frac{1}{2}", WRONG),
    ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", RIGHT),
    ("\\boxed{2\\sqrt2}", "2\\sqrt{2}", RIGHT),
    # units and words
    ("\\boxed{10\\text{ cm}}", "10", RIGHT),
    ("\\boxed{10 cm}", "10", RIGHT),
    ("\\boxed{\\$10}", "10", RIGHT),
    ("\\boxed{10^\\circ}", "10", RIGHT),
    ("\\boxed{\\frac{3}{4}\\text{ cups}}", "\\frac34", RIGHT),
    ("\\boxed{50\\%}", "50\\%", RIGHT),
    ("\\boxed{x = 5}", "5", RIGHT),
    ("\\boxed{\\text{even}}", "\\text{even}", RIGHT),
    ("\\boxed{\\text{odd}}", "\\text{even}", WRONG),
    ("\\boxed{(A)}", "A", RIGHT),
    ("\\boxed{B}", "A", WRONG),
    # tuples, sets, intervals, expressions
    ("\\boxed{(1,2)}", "(1, 2)", RIGHT),
    ("\\boxed{(2,1)}", "(1,2)", WRONG),
    ("\\boxed{\\{2,1\\}}", "\\{1,2\\}", RIGHT),
    ("\\boxed{\\left\\{1,2\\right\\}}", "\\{1,2\\}", RIGHT),
    ("\\boxed{6\\text{ or }7}", "6,7", RIGHT),
    ("\\boxed{[0,1]}", "[0, 1]", RIGHT),
    ("\\boxed{(0,1)}", "[0,1]", WRONG),
    ("\\boxed{x^2+2x+1}", "(x+1)^2", RIGHT),
    ("\\boxed{q - p}", "p - q", WRONG),
    ("\\boxed{\\begin{pmatrix}1\\\\2\\end{pmatrix}}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", RIGHT),
    # hostile
    ("\\boxed{" + "9" * 100_000 + "}", "46", WRONG),
    ("x" * 100_000 + "\\boxed{46}", "46", RIGHT),
    ("\\boxed{" * 15_000, "46", NONE),
    ("\\boxed{" * 15_000 + "}" * 15_000, "46", WRONG),
    ("{" * 100_000, "46", NONE),
    ("####" + " " * 100_000 + "46", "46", RIGHT),
    ("Answer:" * 12_500, "46", WRONG),
    ("**" * 50_000, "46", NONE),
    ("#### " + "</s>" * 25_000 + "46", "46", WRONG),
    ("<think>" * 12_500, "46", NONE),
    ("<answer>" * 12_500, "46", NONE),
    ("#" * 100_000, "46", WRONG),
    ("\\boxed{\\frac{1}{0}}", "46", WRONG),
    ("\\boxed{\x00}", "46", WRONG),
    ("\\boxed{\U0001d7d2\U0001d7d4 apples \u2603}", "7", WRONG),
    ("\\boxed{" + "(" * 40 + "46}", "47", WRONG),
]


@pytest.mark.parametrize(("response", "truth", "expected"), ANSWERS, ids=[str(i) for i in range(len(ANSWERS))])
def test_answers(response, truth, expected):
    result = reward.compute_score("math", response, truth)
    assert (result["score"], result["format"]) == expected
    assert result["acc"] == result["score"] and result["source"] == "math"


def test_verl_loads_the_file_by_path():
    compute_score = load_extern_object(reward.__file__, "compute_score")
    result = compute_score(
        data_source="aime24", solution_str="\\boxed{204}", ground_truth="204", extra_info={}, reward_router_address=None
    )
    assert result == {"score": 1.0, "acc": 1.0, "format": 1.0, "ungraded": 0.0, "pred": "204", "source": "aime24"}


def test_an_empty_ground_truth_is_an_error():
    with pytest.raises(ValueError, match="ground truth is empty"):
        reward.compute_score("math", "\\boxed{1}", " ")


HOSTILE = [
    "9^{9^{9^9}}",
    "((10!)!)!",
    r"\binom{10^{9}}{5\cdot10^{8}}",
    "(" * 400 + "x" + ")" * 400,
    "\\sqrt{" * 150 + "2" + "}" * 150,
    "9" * 100_000,
    "1e999999999",
    "{" * 1000,
    "\\frac" * 200,
]


@pytest.fixture
def short_limit(monkeypatch):
    """One second of CPU time for an answer, so that hostile ones do not take the test's time."""
    monkeypatch.setattr(reward, "_pool", Pool("verl_krpo.reward.algebra:equal", processes=2, seconds=1.0))


@pytest.fixture
def spinning():
    """Two threads of this process that compute all the time, as a busy trainer's."""
    stop = threading.Event()

    def spin():
        while not stop.is_set():
            sum(range(10_000))

    threads = [threading.Thread(target=spin) for _ in range(2)]
    for thread in threads:
        thread.start()
    yield
    stop.set()
    for thread in threads:
        thread.join()


def test_a_thousand_answers_at_once_with_hostile_ones_and_killed_workers(spinning, short_limit):
    """64 threads on a busy machine: every verdict is what it would be alone."""
    plain = [(f"\\frac{{{2 * n}\\pi}}{{{n}}}", "2\\pi" if n % 2 else "3\\pi", float(n % 2)) for n in range(1, 51)]
    quick = [(f"{n}.0", f"{n + n % 3 // 2}", float(n % 3 != 2)) for n in range(941)]
    rows = plain + quick + [(answer, "46", 0.0) for answer in HOSTILE]
    random.Random(0).shuffle(rows)

    def grade(row):
        answer, truth, expected = row
        result = reward.compute_score("math", f"<answer>{answer}</answer>", truth)
        return result["score"] == expected and result["ungraded"] <= (answer in HOSTILE), row

    with ThreadPoolExecutor(64) as threads:
        graded = threads.map(grade, rows)
        processes.kill(processes.below(word="reward.algebra"))
        assert [row for right, row in graded if not right] == []


def test_what_cannot_be_graded_is_said(caplog, short_limit):
    result = reward.compute_score("math", "\\boxed{9^{9^{9^9}}}", "3")
    assert (result["score"], result["format"], result["ungraded"]) == (0.0, 1.0, 1.0)
    assert "not graded" in caplog.text and "more than 1 s of CPU time" in caplog.text


@pytest.mark.parametrize("module", [reward, answer_tag])
def test_keys_and_types_are_the_same_on_every_row(module, short_limit):
    responses = [
        "",
        "46",
        "\\boxed{46}",
        "<answer>46</answer>",
        "\\boxed{9^{9^{9^9}}}",
        "\\boxed{}",
        "<answer>",
        "\x00",
    ]
    rows = [module.compute_score("math", response, "46") for response in responses]
    assert len({tuple((key, type(value)) for key, value in row.items()) for row in rows}) == 1
