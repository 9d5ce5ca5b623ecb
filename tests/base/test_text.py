"""Text for a terminal: no control characters, and lines that end where a reader expects it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from comparisons import places
from overspill.base.text import line_breaks, printable, wrap


def test_control_characters_are_left_out() -> None:
    """Escape sequences lose what makes them commands; line feeds and tabs stay."""
    evil = "a\x1b]0;title\x07b\x1b[2Jc\x9b31md\re\x08f\x00g"
    assert printable(evil + "\n\t") == "a]0;titleb[2Jc31mdefg\n\t"


def test_direction_is_not_controlled() -> None:
    """Overrides, embeddings and isolates would show a text in another order; marks of Arabic and Hebrew stay."""
    controls = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    assert printable(f"rm {controls}-rf{controls} \u05d0\u200f \u0627") == "rm -rf \u05d0\u200f \u0627"


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab cd日本語、。「」ー（） e\u0301👍", max_size=80), st.integers(2, 20))
def test_lines_fit_and_are_the_text(text: str, width: int) -> None:
    """Cut at the breaks, no line is too wide, but for spaces at its end, and nothing is lost."""
    breaks = line_breaks(text, width)
    assert breaks == sorted(set(breaks))
    parts = [text[a:b] for a, b in zip([0, *breaks], [*breaks, len(text)], strict=True)]
    assert "".join(parts) == text
    assert all(cell_len(part.rstrip(" ")) <= width for part in parts)


def test_where_lines_end() -> None:
    """At words; between Japanese characters, but not before a full stop or after an opening bracket."""
    assert wrap("the quick brown fox", 10) == ["the quick", "brown fox"]
    assert wrap("日本語です。次の文", 10) == ["日本語で", "す。次の文"]
    assert wrap("彼は「はい」と言った", 6) == ["彼は", "「は", "い」と", "言った"]
    assert wrap("Python 3は良い言語", 12) == ["Python 3は良", "い言語"]
    assert wrap("abcdefghij", 4) == ["abcd", "efgh", "ij"]
    # Korean has spaces between its words, and an emoji may consist of several.
    assert wrap("나는 학교에 갑니다", 8) == ["나는", "학교에", "갑니다"]
    assert wrap("👍👩\u200d👧", 4)[-1] == "👩\u200d👧"


@pytest.mark.parametrize("width", [1, 10, 24, 41])
@pytest.mark.parametrize(
    "text",
    [
        "1. 太陽光は、赤から紫までのさまざまな色の光が混ざったものです。（「レイリー」散乱）",
        "one two  three\n\n    def f(x):\n\treturn x  # 返す\n" + "x" * 50,
        "日本語とEnglishのmixed、テキスト。" * 5,
        "",
    ],
)
def test_lines_are_broken_where_a_reader_expects_it(text: str, width: int) -> None:
    """Nothing is lost or too wide; Japanese fills lines, and none begins with a mark that ends something."""
    lines = wrap(text, width)
    assert re.sub(r"\s", "", "".join(lines)) == re.sub(r"\s", "", text)
    assert all(len(place.rstrip()) <= width for place in places(lines)) or width == 1
    assert len(lines) > text.count("\n")
    if width >= 10:
        assert not [line for line in lines if re.match("[、。）」ーョ]", line)]
    if text.startswith("1.") and width >= 24:
        assert lines[0].startswith("1. 太陽光は、赤")
        assert all(len(places([line])[0]) >= width - 6 for line in lines[:-1])
