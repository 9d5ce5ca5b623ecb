"""Markdown that is written piece by piece looks as if it had been written at once, and all of it can be scrolled to."""

from __future__ import annotations

import io
import random
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.markdown import Markdown

from overspill.cli.terminal.streamed_markdown import StreamedMarkdown
from terminal_screen import lines_of, screen_of

BLOCKS = [
    "# A heading 見出し",
    "Some **bold** text with `code`, and enough of it that it does not fit into one line of a terminal.",
    "日本語の段落です。長い文章なので折り返されます、句読点は行頭に来ません。そうでしょう？「引用」もあります。" * 2,
    "Two lines\nthat belong together",
    "1. one\n2. two\n   - nested\n   - 入れ子\n3. three",
    "1. loose\n\n2. list\n\n   with a paragraph",
    "- a\n- b\n- " + "c " * 60,
    "\n".join(f"{n}. item" for n in range(1, 31)),
    "1. all\n1. ones\n1. which\n\n1. count",
    "7) seven\n8) eight",
    "> quoted\n> text",
    "```python\n" + "\n".join(f"line_{n} = {n}  # 日本語" for n in range(30)) + "\n```",
    "~~~\n# no heading\n- no list\n~~~",
    "| name | 値 |\n|---|--:|\n" + "\n".join(f"| row {n} | {n} |" for n in range(30)),
    "---",
    "<div>not HTML</div> & [a link](https://example.org)",
]


def written(text: str, seed: int | None, rows: int = 24, columns: int = 80) -> str:
    """Return what goes to the terminal for a text in pieces, or at once."""
    output = io.StringIO()
    console = Console(
        file=output, force_terminal=True, color_system="256", width=columns, height=rows, legacy_windows=False
    )
    markdown = StreamedMarkdown(console, frame_s=0)
    pieces = random.Random(seed)
    while text:
        n = len(text) if seed is None else pieces.randint(1, 9)
        markdown.write(text[:n])
        text = text[n:]
    markdown.finish()
    return output.getvalue()


def without_margins(lines: list[str]) -> list[str]:
    """Leave out the space before a line: an item's number takes as much as that of the last item drawn with it."""
    return [line.lstrip() for line in lines]


def check_pieces(blocks: list[str], seed: int, rows: int) -> None:
    """Check that every line is there once, in order."""
    text = "\n\n".join(blocks)
    in_pieces = lines_of(screen_of(written(text, seed, rows), rows=rows))
    at_once = lines_of(screen_of(written(text, None, 2000), rows=2000))
    assert without_margins(in_pieces) == without_margins(at_once)
    # And nothing that a reader of the source would look for is missing.
    words = re.findall(r"\w+", re.sub(r"```python|\|?-+\|?|<[^>]*>|https?", " ", "\n".join(blocks)))
    shown = "".join("".join(in_pieces).split())
    assert all(word in shown for word in words)


TEXTS = st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=6)


@settings(max_examples=6, deadline=None)
@given(TEXTS, st.integers(0, 10**6), st.integers(3, 40))
@example(["---", "1. one\n2. two"], 0, 3)
@example(["# A heading", "---", "- a", "---", "text"], 0, 3)
def test_pieces_come_to_the_same_as_the_whole(blocks: list[str], seed: int, rows: int) -> None:
    """However it is cut and however tall the screen is."""
    check_pieces(blocks, seed, rows)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(TEXTS, st.integers(0, 10**6), st.integers(3, 40))
def test_many_pieces_come_to_the_same_as_the_whole(blocks: list[str], seed: int, rows: int) -> None:
    """The same for more texts."""
    check_pieces(blocks, seed, rows)


@pytest.mark.parametrize("block", BLOCKS)
def test_it_is_the_markdown_that_rich_shows(block: str) -> None:
    """Words and their order are rich's own, which renders the whole."""
    output = io.StringIO()
    Console(file=output, width=80, legacy_windows=False).print(Markdown(block, hyperlinks=False))
    ours, theirs = (
        "".join(text.replace("▌", "").split())
        for text in ("".join(lines_of(screen_of(written(block, 1)))), output.getvalue())
    )
    if "<div>" not in block:  # which rich drops
        assert ours == theirs


def test_line_breaks_of_the_source_count() -> None:
    """Models mean them, and Japanese has no space to put in their place."""
    assert lines_of(screen_of(written("古池や\n蛙飛び込む\n水の音", 1))) == ["古池や", "蛙飛び込む", "水の音"]


def test_html_is_text() -> None:
    """A tag that is not in code is shown all the same."""
    assert lines_of(screen_of(written("Use <b>bold</b> here.\n\n<div>x</div>", 1))) == [
        "Use <b>bold</b> here.",
        "",
        "<div>x</div>",
    ]


def test_lines_that_have_not_changed_are_not_touched() -> None:
    """Of a block that grows, only the end is written again: nothing flickers."""
    text = "\n".join(f"line {n}" for n in range(12))
    output = written(f"```\n{text}\n```\n", 3)
    assert output.count("line 0") <= 7  # while the line itself came
    assert "\x1b[2J" not in output


def test_control_characters_do_nothing() -> None:
    """A reply cannot set the title, move the cursor, ring the bell, or turn text around."""
    evil = "a\x1b]0;title\x07b\x1b[2Jc\x9b31md\re\x08f\x00g\u202eh\u2066i"
    for wrapped in (evil, f"`{evil}`", f"```{evil}\n{evil}\n```"):
        output = written(wrapped, 1)
        rest = re.sub(r"\x1b\[(\?2026[hl]|\?7[hl]|[\d;]*[mAKJ])", "", output)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", rest), rest


def test_a_narrower_window_loses_nothing() -> None:
    """What was drawn before may be seen twice then, but all of it is there."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=80, height=24, legacy_windows=False)
    markdown = StreamedMarkdown(console, frame_s=0)
    markdown.write("Once upon a time ")
    console.width = 40
    markdown.write("there was a princess who lived in a castle by the sea")
    markdown.finish()
    shown = " ".join(" ".join(lines_of(screen_of(output.getvalue()))).split())
    assert "Once upon a time there was a princess who lived in a castle by the sea" in shown
