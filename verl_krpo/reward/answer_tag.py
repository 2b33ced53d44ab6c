"""The answer-tag reward of KRPO (arXiv 2505.07527, published code `rollout`).

verl loads this file by path (`reward.custom_reward_function.path=.../answer_tag.py`), so it imports nothing.

    the text between the first <answer> and the next </answer>        score
    equals the ground truth, character by character                    1
    contains the ground truth                                          0.5
    anything else, the empty string included                           0.01
    there is no such pair of tags                                      0

As published, white space counts: `<answer> 46 </answer>` contains 46 and scores 0.5.
"""

EXACT, CONTAINED, OTHER, NONE = 1.0, 0.5, 0.01, 0.0


def extract(text: str) -> str | None:
    """What stands between the first <answer> and the next </answer>, or None. Linear in the length of the text."""
    _, opened, rest = text.partition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    return answer if opened and closed else None


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None, **kwargs
) -> dict[str, float]:
    """Score one response: {"score": reward, "acc": 1 if exact, "format": 1 if tagged}.

    ValueError when the ground truth is empty, since every answer would contain it.
    """
    truth = str(ground_truth)
    if not truth:
        raise ValueError(f"{data_source}: the ground truth is empty; drop the row or mend reward_model.ground_truth")
    answer = extract(solution_str)
    if answer is None:
        score = NONE
    elif answer == truth:
        score = EXACT
    elif truth in answer:
        score = CONTAINED
    else:
        score = OTHER
    return {"score": score, "acc": float(score == EXACT), "format": float(answer is not None)}
