"""Markdown as lines for a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, HorizontalRule, Markdown, MarkdownElement, Paragraph, TableElement
from rich.rule import Rule
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from overspill.base.text import line_breaks

__all__ = ["markdown_lines", "parse_markdown"]


_STYLES = re.compile(r"\x1b\[[0-9;]*m")


def _wrapped(text: Text, width: int) -> Iterator[Text]:
    for line in text.split(allow_blank=True):
        line.expand_tabs(4)
        for part in line.divide(line_breaks(line.plain, max(2, width))):
            part.rstrip()
            yield part


class _Paragraph(Paragraph):
    """Text whose lines may end between Japanese characters."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _wrapped(self.text, options.max_width)


class _Heading(Heading):
    """A heading at the left, wrapped in the same way."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _wrapped(self.text, options.max_width)


class _Code(CodeBlock):
    """Code on the terminal's own background, without a frame that would be copied along."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Syntax(
            str(self.text).rstrip(),
            self.lexer_name,
            theme="ansi_dark",
            background_color="default",
            word_wrap=True,
            padding=(0, 2),
        )


class _Rule(HorizontalRule):
    """A rule, with one empty line before and after it as other blocks have."""

    new_line = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from (part for part in super().__rich_console__(console, options) if isinstance(part, Rule))


class _Table(TableElement):
    """A table without empty lines around it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in super().__rich_console__(console, options):
            if isinstance(table, Table):
                table.show_edge = False
            yield table


class _Rendered(Markdown):
    """Markdown as models mean it: their line breaks count, and HTML is text."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "paragraph_open": _Paragraph,
        "heading_open": _Heading,
        "fence": _Code,
        "code_block": _Code,
        "table_open": _Table,
        "hr": _Rule,
    }

    def __init__(self, markup: str, number: int | None = None) -> None:
        # A link's address is shown: a terminal could hide any address behind a text.
        super().__init__("", hyperlinks=False)
        self.parsed = parse_markdown(markup, number)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


def parse_markdown(markup: str, number: int | None) -> list[Token]:
    """Return the tokens; ``number`` is the number of the first list item, where the list began earlier."""
    tokens = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).parse(markup)
    if number is not None and tokens and tokens[0].type == "ordered_list_open":
        tokens[0].attrs["start"] = number
    return tokens


def markdown_lines(console: Console, markup: str, number: int | None) -> list[str]:
    """Return the lines that ``console`` would print, with escape sequences; ``number`` as in :func:`parse_markdown`."""
    with console.capture() as capture:
        console.print(_Rendered(markup, number))
    lines = [line.rstrip(" ") for line in capture.get().removesuffix("\n").split("\n")]
    # Some blocks bring empty lines of their own.
    filled = [i for i, line in enumerate(lines) if _STYLES.sub("", line).strip()]
    return lines[filled[0] : filled[-1] + 1] if filled else []
