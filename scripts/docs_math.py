"""An mkdocs hook: formulas become MathML when the site is built, so that a page needs neither script nor network."""

import html
import re

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
# Docstrings write x_{i|i-1} in plain text: those of the API page, outside of code.
CODE = re.compile(r"(<(?:pre|code|math|title)\b.*?</(?:pre|code|math|title)>|<[^>]*>)", re.DOTALL)
PLAIN = re.compile(r"\b[A-Za-z]_\{[^{}<]+\}")


def on_page_content(content: str, **kwargs) -> str:
    """Replace what pymdownx.arithmatex marks, and indices in plain text."""
    content = INLINE.sub(lambda found: convert(html.unescape(found[1]).strip()), content)
    content = BLOCK.sub(
        lambda found: f'<div class="formula">{convert(html.unescape(found[1]).strip(), display="block")}</div>', content
    )
    parts = CODE.split(content)  # text at even places
    parts[::2] = [PLAIN.sub(lambda found: convert(html.unescape(found[0])), part) for part in parts[::2]]
    return "".join(parts)
