"""Sizes, rates and counts: as people write them, and as people read them."""

from __future__ import annotations

import math

import pytest

from overspill.base.units import format_bytes, format_count, format_rate, parse_bytes, parse_rate

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GiB", 24 * GIB),
        ("24gib", 24 * GIB),
        ("24 GB", 24_000_000_000),
        ("16.5 GB", 16_500_000_000),
        ("1.5GiB", 3 * GIB // 2),
        (" .5 MiB ", 2**19),
        ("512MB", 512_000_000),
        ("3kB", 3000),
        ("3KiB", 3072),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        ("17B", 17),
        ("0GiB", 0),
        (12345, 12345),
        (0, 0),
    ],
)
def test_sizes(text: int | str, expected: int) -> None:
    """Powers of 1000 and of 1024 are told apart, and integers are bytes."""
    assert parse_bytes("vram", text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("24", 'vram must have a unit: "24GiB" or "24GB", not "24"'),
        ("24G", 'vram must have a unit: "24GiB" or "24GB", not "24G"'),
        ("24GB/s", "vram must have a unit"),
        ("", "vram must be a size such as"),
        ("lots", "vram must be a size such as"),
        ("nanGiB", "vram must be a size such as"),
        ("1e3GiB", "vram must have a unit"),
        ("1,5GiB", "vram must have a unit"),
        ("-24GiB", r"vram must be 0 to 2\*\*50 bytes, not \"-24GiB\""),
        ("2000TiB", r"vram must be 0 to 2\*\*50 bytes"),
        ("9" * 400 + "GiB", r"vram must be 0 to 2\*\*50 bytes"),
        (-1, r"vram must be 0 to 2\*\*50 bytes, not -1"),
        (2**50 + 1, r"vram must be 0 to 2\*\*50 bytes"),
    ],
)
def test_bad_sizes(text: int | str, message: str) -> None:
    """Errors say what is meant."""
    with pytest.raises(ValueError, match=message):
        parse_bytes("vram", text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("936GB/s", 936e9),
        ("47 gB/S", 47e9),
        ("1GiB / s", GIB),
        ("10Gbit/s", 1.25e9),
        ("100 Mbit/s", 12.5e6),
        (5e9, 5e9),
        (7, 7.0),
    ],
)
def test_rates(text: float | str, expected: float) -> None:
    """Bytes and bits are told apart, and numbers are bytes per second."""
    assert parse_rate("link", text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("936", 'link must have a unit: "936GB/s" or "936Gbit/s", not "936"'),
        ("936GB", "link must have a unit"),
        ("936GB/h", "link must have a unit"),
        ("10Gb/s", 'link: write "10GB/s" for bytes or "10Gbit/s" for bits'),
        ("fast", "link must be a rate"),
        ("0GB/s", "link must be over 0"),
        ("-1GB/s", "link must be over 0"),
        (0, "link must be over 0"),
        (math.inf, "link must be over 0"),
        (math.nan, "link must be over 0"),
    ],
)
def test_bad_rates(text: float | str, message: str) -> None:
    """Errors say what is meant."""
    with pytest.raises(ValueError, match=message):
        parse_rate("link", text)


@pytest.mark.parametrize("value", [None, 1.5, [1], b"1GiB"])
def test_what_is_no_size(value: object) -> None:
    """Half a byte is a mistake."""
    with pytest.raises(TypeError, match="vram must be bytes as an integer"):
        parse_bytes("vram", value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("n_bytes", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (5 * 2**20 + 2**19, "5.5 MiB"),
        (100 * 2**20, "100 MiB"),
        (2**30 - 1, "1024 MiB"),
        (63_374_366_752, "59.0 GiB"),
        (3 * 2**40, "3072 GiB"),
    ],
)
def test_sizes_as_text(n_bytes: int, expected: str) -> None:
    """The unit is the largest that fits, and small numbers have a digit after the point."""
    assert format_bytes(n_bytes) == expected


def test_sizes_in_a_given_unit() -> None:
    """Unit and digits may be given, as for a column of sizes."""
    assert format_bytes(GIB // 4, digits=2, unit="GiB") == "0.25 GiB"
    assert format_bytes(120 * GIB, digits=1, unit="GiB") == "120.0 GiB"
    assert format_bytes(3 * 2**20, digits=2) == "3.00 MiB"
    assert format_bytes(512, digits=2) == "512 B"


def test_rates_and_counts_as_text() -> None:
    """Rates are in 10^9 bytes per second, and one thing has no plural."""
    assert format_rate(46.93e9) == "46.9 GB/s"
    assert parse_rate("link", format_rate(936e9)) == 936e9
    assert [format_count(n, "layer") for n in (0, 1, 2)] == ["0 layers", "1 layer", "2 layers"]
