"""What LaTeX boxes hold."""

import re

_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\(?:boxed|fbox)\s+([^\s{}$.,]+)|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    """What the last complete \\boxed{...} or \\fbox{...} holds, the innermost of nested ones; None without one.

    Braces are matched, escaped ones passed over; a bare `\\boxed 5` counts too. Time is linear in the text's length.
    """
    open_braces: list[int | None] = []  # where a box's content starts; None for an ordinary brace
    spans: list[tuple[int, int]] = []
    for token in _TOKEN.finditer(text):
        if token[1] is not None:
            spans.append(token.span(1))
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None:
                spans.append((start, token.start()))
        elif token[0].endswith("{") and token[0] != "\\{":
            open_braces.append(token.end())
    if not spans:
        return None
    # Boxes are in the order they close in. Going back, each that lies in the one after it is its innermost last box.
    start, end = spans[-1]
    for inner_start, inner_end in reversed(spans[:-1]):
        if inner_start < start:
            break
        start, end = inner_start, inner_end
    return text[start:end].strip()
