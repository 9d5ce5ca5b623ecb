"""Models' Markdown as HTML that is safe to open."""

from __future__ import annotations

import re
from collections.abc import Sequence

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from markupsafe import Markup

__all__ = ["render_markdown"]

_LINK = re.compile(r"(https?|mailto):", re.IGNORECASE)


def _image(renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
    """Render an image as a link: loading it would tell its server who reads the page, and when."""
    token = tokens[index]
    text = escapeHtml(renderer.renderInlineAsText(token.children or [], options, env) or str(token.attrs["src"]))
    return f'<a href="{escapeHtml(str(token.attrs["src"]))}" rel="noopener noreferrer nofollow">image: {text}</a>'


def _markdown() -> MarkdownIt:
    markdown = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    markdown.validateLink = lambda url: _LINK.match(url) is not None  # type: ignore[method-assign]
    markdown.add_render_rule("image", _image)
    return markdown


_MARKDOWN = _markdown()


def render_markdown(text: str) -> Markup:
    """Return a model's Markdown as HTML. HTML in it becomes text; only links to the web and to mail are links."""
    tokens = _MARKDOWN.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + 3)}"  # below those of the page
        if token.type in ("th_open", "td_open") and "style" in token.attrs:  # which a strict policy forbids
            token.attrs = {"align": str(token.attrs["style"]).removeprefix("text-align:")}
        for child in token.children or []:
            if child.type == "link_open":
                child.attrSet("rel", "noopener noreferrer nofollow")
    return Markup(_MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {}))
