import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from verl.utils.import_utils import load_extern_object

from verl_krpo.reward import answer_tag

EXACT, CONTAINED, OTHER, NONE = 1.0, 0.5, 0.01, 0.0

# (response, ground truth, score)
ANSWERS = [
    ("<answer>46</answer>", "46", EXACT),
    ("<think>12 and 34</think><answer>46</answer>", "46", EXACT),
    ("<think>a\nb</think>\n<answer>46</answer>\n", "46", EXACT),
    ("It is <answer>46</answer>.", "46", EXACT),
    ("<answer>46</answer><answer>47</answer>", "46", EXACT),
    ("<answer>-631</answer>", "-631", EXACT),
    ("<answer>0</answer>", "0", EXACT),
    ("</answer><answer>46</answer>", "46", EXACT),
    ("</think><answer>46</answer>", "46", EXACT),
    ("<answer>46</answer> and more </answer>", "46", EXACT),
    ("<answer>\\frac{1}{2}</answer>", "\\frac{1}{2}", EXACT),
    ("<answer>4" + "0" * 99_999 + "</answer>", "4" + "0" * 99_999, EXACT),
    ("x" * 100_000 + "<answer>46</answer>", "46", EXACT),
    ("<answer>\u00bd</answer>", "\u00bd", EXACT),
    ("<answer>3.14</answer>", "3.14", EXACT),
    ("<answer>46</answer>" + "x" * 100_000, "46", EXACT),
    ("<answer> 46 </answer>", "46", CONTAINED),
    ("<answer>46\n</answer>", "46", CONTAINED),
    ("<answer>\n46\n</answer>", "46", CONTAINED),
    ("<answer>46.</answer>", "46", CONTAINED),
    ("<answer>46.0</answer>", "46", CONTAINED),
    ("<answer>$46</answer>", "46", CONTAINED),
    ("<answer>46 apples</answer>", "46", CONTAINED),
    ("<answer>12+34=46</answer>", "46", CONTAINED),
    ("<answer>146</answer>", "46", CONTAINED),
    ("<answer>-46</answer>", "46", CONTAINED),
    ("<answer>+46</answer>", "46", CONTAINED),
    ("<answer>046</answer>", "46", CONTAINED),
    ("<answer>46 or 47</answer>", "46", CONTAINED),
    ("<answer>47 or 46</answer>", "46", CONTAINED),
    ("<answer>\\boxed{46}</answer>", "46", CONTAINED),
    ("<answer>**46**</answer>", "46", CONTAINED),
    ("<answer><answer>46</answer>", "46", CONTAINED),
    ("<answer>1246</answer>", "46", CONTAINED),
    ("<answer>\u00a046</answer>", "46", CONTAINED),
    ("<answer>" + "9" * 100_000 + "46</answer>", "46", CONTAINED),
    ("<answer>$\\frac{1}{2}$</answer>", "\\frac{1}{2}", CONTAINED),
    ("<answer>a <b>46</b></answer>", "46", CONTAINED),
    ("<answer>47</answer>", "46", OTHER),
    ("<answer></answer>", "46", OTHER),
    ("<answer> </answer>", "46", OTHER),
    ("<answer>4 6</answer>", "46", OTHER),
    ("<answer>4,600</answer>", "4600", OTHER),
    ("<answer>forty-six</answer>", "46", OTHER),
    ("<answer>\uff14\uff16</answer>", "46", OTHER),
    ("<answer>\u221246</answer>", "-46", OTHER),
    ("<answer>- 46</answer>", "-46", OTHER),
    ("<answer>46</answer>", "-46", OTHER),
    ("<answer>47</answer><answer>46</answer>", "46", OTHER),
    ("<answer>none</answer> 46", "46", OTHER),
    ("<answer>0.5</answer>", "1/2", OTHER),
    ("<answer>\x00</answer>", "46", OTHER),
    ("<answer>" + "9" * 100_000 + "</answer>", "46", OTHER),
    ("<think><answer>1</answer></think><answer>46</answer>", "46", OTHER),
    ("", "46", NONE),
    ("46", "46", NONE),
    ("<answer>46", "46", NONE),
    ("46</answer>", "46", NONE),
    ("</answer>46<answer>", "46", NONE),
    ("<Answer>46</Answer>", "46", NONE),
    ("<answer >46</answer>", "46", NONE),
    ("<answer>46</answer", "46", NONE),
    ("<answer>46</ answer>", "46", NONE),
    ("&lt;answer&gt;46&lt;/answer&gt;", "46", NONE),
    ("\\boxed{46}", "46", NONE),
    ("#### 46", "46", NONE),
    ("<think>46</think>", "46", NONE),
    ("<answer>" * 12_500, "46", NONE),
    ("</answer>" * 12_500, "46", NONE),
    ("<answer>" + "9" * 100_000, "46", NONE),
]


@pytest.mark.parametrize(("response", "truth", "score"), ANSWERS, ids=[str(i) for i in range(len(ANSWERS))])
def test_answers(response, truth, score):
    result = answer_tag.compute_score("arithmetic", response, truth)
    assert result == {"score": score, "acc": float(score == EXACT), "format": float(score != NONE)}


def published(response: str, truth: str) -> float:
    """The published rule, with a regular expression."""
    found = re.search("<answer>(.*?)</answer>", response, flags=re.DOTALL)
    if found is None:
        return 0.0
    return 1.0 if found[1] == truth else 0.5 if truth in found[1] else 0.01


@given(
    st.lists(st.sampled_from(["<answer>", "</answer>", "4", "6", "46", " ", "\n", "-", "<"]), max_size=12).map("".join)
)
def test_agrees_with_the_published_rule(response):
    assert answer_tag.compute_score("arithmetic", response, "46")["score"] == published(response, "46")


def test_verl_loads_the_file_by_path():
    compute_score = load_extern_object(answer_tag.__file__, "compute_score")
    result = compute_score(
        data_source="a",
        solution_str="<answer>1</answer>",
        ground_truth="1",
        extra_info={"index": 0},
        reward_router=None,
    )
    assert result["score"] == 1.0


def test_an_empty_ground_truth_is_an_error():
    with pytest.raises(ValueError, match="ground truth is empty"):
        answer_tag.compute_score("arithmetic", "<answer></answer>", "")
