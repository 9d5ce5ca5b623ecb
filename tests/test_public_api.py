"""What users call stays: names, parameters, defaults, values and options are those of a stored listing."""

from __future__ import annotations

from difflib import unified_diff
from pathlib import Path

import overspill
from public_api import listing

STORED = Path(__file__).parent / "public_api.txt"


def test_the_public_api_is_the_stored_one() -> None:
    """Where a change is meant, ``public_api.py`` in ``tests/support`` says how to write the listing anew."""
    stored = STORED.read_text(encoding="utf-8").splitlines()
    changes = list(unified_diff(stored, listing(), "tests/public_api.txt", "the package", lineterm=""))
    assert not changes, "\n".join(changes)


def test_every_name_is_listed() -> None:
    """None of the exported names is missing, and none names a module that it could be moved out of."""
    lines = STORED.read_text(encoding="utf-8").splitlines()
    listed = {line.split(":")[0].split("(")[0].removeprefix("overspill.") for line in lines if line[:1] != " "}
    assert set(overspill.__all__) <= listed
    assert not [line for line in lines if "overspill." in line[1:]]
