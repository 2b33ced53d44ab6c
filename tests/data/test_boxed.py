import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_krpo.data.boxed import last_boxed


def matched_by_counting(text: str) -> str | None:
    """The last box that closes, by trying every opening and counting braces from it."""
    ends = {}
    for start in (i for i in range(len(text)) if text.startswith("\\boxed{", i)):
        depth = 0
        for at in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                ends[at] = text[start + len("\\boxed{") : at]
                break
    if not ends:
        return None
    found = ends[max(ends)]
    inner = matched_by_counting(found)
    return found.strip() if inner is None else inner


@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "1", " ", "x"]), max_size=14).map("".join))
def test_last_boxed_agrees_with_counting_braces(text):
    # A closing brace without an opening one belongs to no box; the counter starts at the box and never sees it.
    assert last_boxed(text) == matched_by_counting(text)


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\boxed{\\{1\\}}", "\\{1\\}"),
        ("\\boxed{a\\\\{b}}", "a\\\\{b}"),
        ("$\\boxed 2$", "2"),
        ("\\unboxed{2}", None),
    ],
)
def test_boxes_with_escaped_braces(text, boxed):
    assert last_boxed(text) == boxed
