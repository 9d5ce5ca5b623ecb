"""Which way includes and imports point."""

import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

CPP = Path(__file__).parents[1] / "cpp"
FOLDERS = ["base", "gguf", "product", "device", "model", "sample", "text", "generate", "bindings"]
"""Of ``cpp/``, as the data flows: a file includes only files of its own folder and of those before it."""

INCLUDE = re.compile(r'^\s*#\s*include\s+(["<])([^">]+)[">]', re.MULTILINE)


def includes(root: Path) -> dict[str, list[tuple[str, str]]]:
    """Return the includes of each source file below ``root``, as (``"`` or ``<``, name) pairs."""
    sources = sorted(path for path in root.rglob("*") if path.suffix in {".h", ".cpp"})
    return {path.relative_to(root).as_posix(): INCLUDE.findall(path.read_text()) for path in sources}


def violations(root: Path) -> list[str]:
    """Return the faults of the includes below ``root``, one line each."""
    found = includes(root)
    wrong = []
    for name, included in found.items():
        folder = name.partition("/")[0]
        for quote, other in included:
            if quote == '"' and other not in found:
                wrong.append(f"{name} includes {other}, which is no file of the core named from its root")
            elif quote == '"' and FOLDERS.index(other.partition("/")[0]) > FOLDERS.index(folder):
                wrong.append(f"{name} includes {other} of a later folder")
            if quote == "<" and (other.startswith("pybind11") or other == "Python.h") and folder != "bindings":
                wrong.append(f"{name} includes {other}, which only bindings/ may")
    headers = {
        name: [other for quote, other in included if quote == '"']
        for name, included in found.items()
        if name.endswith(".h")
    }
    try:
        TopologicalSorter(headers).prepare()
    except CycleError as error:
        wrong.append("headers include each other in a circle: " + " > ".join(error.args[1]))
    return wrong


def test_the_core_includes_in_one_direction() -> None:
    """No include points to a later folder or closes a circle."""
    found = includes(CPP)
    assert {name.partition("/")[0] for name in found} == set(FOLDERS)
    assert sum(len(included) for included in found.values()) > 200  # the pattern matches
    assert violations(CPP) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"base/a.h": '#include "model/b.h"', "model/b.h": ""}, "base/a.h includes model/b.h of a later folder"),
        ({"text/a.h": '#  include "text/b.h"', "text/b.h": '#include "text/a.h"'}, "in a circle"),
        ({"model/a.h": "#include <pybind11/stl.h>"}, "only bindings/ may"),
        ({"model/a.cpp": '#include "a.h"', "model/a.h": ""}, "no file of the core"),
    ],
)
def test_a_wrong_include_is_seen(tmp_path: Path, files: dict[str, str], message: str) -> None:
    """Each kind of wrong include is named."""
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n")
    (only,) = violations(tmp_path)
    assert message in only


def test_includes_in_order_are_right(tmp_path: Path) -> None:
    """The bindings may include the base and pybind11."""
    (tmp_path / "base").mkdir()
    (tmp_path / "bindings").mkdir()
    (tmp_path / "base" / "a.h").write_text("#include <string>\n")
    (tmp_path / "bindings" / "b.cpp").write_text('#include "base/a.h"\n#include <pybind11/pybind11.h>\n')
    assert violations(tmp_path) == []
