"""A reply on the screen while it is generated."""

from __future__ import annotations

from typing import Literal, TypeAlias

from rich.console import Console
from rich.text import Text

from overspill.base.text import printable
from overspill.base.units import format_count
from overspill.cli.output import write_reply
from overspill.cli.terminal.streamed_markdown import StreamedMarkdown
from overspill.engine.reply import Channel, ChatToken

__all__ = ["Reasoning", "ReplyOnScreen"]


Reasoning: TypeAlias = Literal["dim", "hide"]


class ReplyOnScreen:
    """Shows a reply: reasoning dimmed or as a number of tokens, the answer as Markdown."""

    def __init__(self, console: Console, reasoning: Reasoning) -> None:
        self._console, self._reasoning = console, reasoning
        # Elsewhere than in a terminal, the answer is plain text, without reasoning.
        is_plain = not console.is_terminal or console.is_dumb_terminal or console.legacy_windows
        self._markdown = None if is_plain else StreamedMarkdown(console)
        self._channel: Channel | None = None
        self._n_reasoning = 0
        self._line_feeds = ""

    def __enter__(self) -> ReplyOnScreen:
        if self._markdown is not None:
            self._markdown.note("…")
        return self

    def __exit__(self, *_: object) -> None:
        if self._markdown is None:
            write_reply("\n")
            return
        if self._channel is Channel.REASONING and self._reasoning == "dim":
            self._console.print()
        elif self._channel in (None, Channel.REASONING):
            self._markdown.note("")
        self._markdown.finish()
        self._console.print()

    def take(self, token: ChatToken) -> None:
        """Show one more token."""
        if self._markdown is None:
            if token.channel is not Channel.REASONING:
                write_reply(token.text)
            return
        if token.channel is Channel.REASONING:
            self._take_reasoning(self._markdown, token.text)
        elif token.text:
            if self._channel is Channel.REASONING and self._reasoning == "dim":
                self._console.print("\n")
            self._channel = Channel.FINAL
            self._markdown.write(token.text)

    def _take_reasoning(self, markdown: StreamedMarkdown, text: str) -> None:
        self._n_reasoning += 1
        if self._reasoning == "hide":
            markdown.note(f"thinking, {format_count(self._n_reasoning, 'token')}…")
        elif text:
            if self._channel is None:
                markdown.note("")
                text = text.lstrip()
            # Empty lines at its end are not shown.
            text = self._line_feeds + printable(text)
            said = text.rstrip("\n")
            self._line_feeds = text[len(said) :]
            self._console.print(Text(said, "dim"), end="", soft_wrap=True)
        if text:
            self._channel = Channel.REASONING
