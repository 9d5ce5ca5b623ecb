"""Arguments that are wrong, and names of devices in any case."""

from __future__ import annotations

import pytest

from overspill.base.checks import as_integer, as_real, check_choice, device_index


def test_integers() -> None:
    """Whatever counts as an integer is one; the error names the range that somebody would look for."""
    assert as_integer("n", True, 0, 5) == 1
    with pytest.raises(ValueError, match="n must be 0 to 5, not 6"):
        as_integer("n", 6, 0, 5)
    with pytest.raises(ValueError, match="n must be at least 1, not 0"):
        as_integer("n", 0, 1, 2**31 - 1)
    with pytest.raises(TypeError, match=r"n must be an integer, not 1\.5"):
        as_integer("n", 1.5, 0, 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="x must be a number, not '1'"):
        as_real("x", "1")  # type: ignore[arg-type]


def test_choices() -> None:
    """The error names all of them; what cannot be hashed is no choice either."""
    check_choice("mode", "read", ("mmap", "read"))
    for wrong in ("READ", None, ["read"]):
        with pytest.raises(ValueError, match="mode must be one of mmap, read, not"):
            check_choice("mode", wrong, {"mmap": 1, "read": 2})


def test_device_names() -> None:
    """Names hold in any case; "gpu" is the first GPU, if there is one, and "cpu" the last device."""
    names = ["RPC0", "CUDA0", "CPU"]
    assert [device_index(names, name) for name in ("cuda0", "GPU", "cpu", "Cpu", "CUDA1")] == [1, 0, 2, 2, None]
    assert device_index(["CPU"], "gpu") is None
