"""An mkdocs hook: formulas become MathML when the site is built, so that a page needs neither script nor network."""

import html
import re

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_page_content(content: str, **kwargs) -> str:
    """Replace what pymdownx.arithmatex marks."""
    content = INLINE.sub(lambda found: convert(html.unescape(found[1]).strip()), content)
    return BLOCK.sub(
        lambda found: f'<div class="formula">{convert(html.unescape(found[1]).strip(), display="block")}</div>', content
    )
