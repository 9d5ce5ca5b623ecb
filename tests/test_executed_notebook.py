"""A notebook that is executed: its outputs as Jupyter keeps them, with the figures of the objects."""

from __future__ import annotations

import base64
import pickle
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, fromstring

import nbformat
import pytest
from nbclient import NotebookClient

from overspill import ChatReply, Comparison, Plan
from overspill.base.units import format_bytes

pytestmark = pytest.mark.usefixtures("no_gpu")

CELLS = {
    "plan": """
        from overspill import Hardware, Model, compare, plan

        planned = plan(large, hardware=Hardware.given(ram="64GiB", vram=["8GiB"]))
        planned
    """,
    "reply": """
        with Model(small, n_ctx=512, n_threads=1) as model:
            reply = model.ask("What is <b>2 + 2</b> & why?", max_tokens=16, temperature=0)
        reply
    """,
    "comparison": """
        comparison = compare([small, other], ["Name a colour."], n_ctx=256, n_threads=1, max_tokens=8, temperature=0)
        comparison
    """,
    "objects": """
        import base64, pickle

        print(base64.b64encode(pickle.dumps((planned, reply, comparison))).decode())
    """,
}


@pytest.fixture(scope="module")
def outputs(
    smollm2_path: Path, gemma_path: Path, header_path: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Return the one output of each cell of a notebook."""
    paths = {"small": smollm2_path, "other": gemma_path, "large": header_path("gpt-oss-20b")}
    first = "\n".join(f"{name} = {str(path)!r}" for name, path in paths.items())
    sources = [first, *("\n".join(line[8:] for line in cell.splitlines()) for cell in CELLS.values())]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source.strip()) for source in sources])
    folder = str(tmp_path_factory.mktemp("notebook"))
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    nbformat.validate(notebook)
    found = {}
    for name, cell in zip(CELLS, notebook.cells[1:], strict=True):
        # The log and progress bars go to the error stream.
        (found[name],) = (one for one in cell.outputs if one.get("name") != "stderr")
    return found


@pytest.fixture(scope="module")
def objects(outputs: dict[str, Any]) -> tuple[Plan, ChatReply, Comparison]:
    """Return what the notebook showed, out of its process."""
    planned, reply, comparison = pickle.loads(base64.b64decode(outputs["objects"]["text"]))
    return planned, reply, comparison


def page_of(output: Any) -> Element:
    """Return an output's HTML, read by an XML parser."""
    assert output["output_type"] == "execute_result"
    assert "\n" not in output["data"]["text/plain"]
    return fromstring(f"<div>{output['data']['text/html'].replace('<br>', '<br/>')}</div>")


def text_of(page: Element) -> str:
    """Return the text of an element."""
    return "".join(page.itertext()).replace("\N{NO-BREAK SPACE}", " ")


def test_a_plan_is_shown(outputs: dict[str, Any], objects: tuple[Plan, ChatReply, Comparison]) -> None:
    """The bars are the bytes of the forecast, and its speeds are said."""
    forecast, page = objects[0].forecast(), page_of(outputs["plan"])
    bars = {one.get("data-device"): one for one in page.iter("div") if one.get("data-device")}
    assert [*bars] == [*forecast.memory] == ["GPU0", "CPU"]
    for device, use in forecast.memory.items():
        parts = [(one.get("title") or "", int(one.get("data-bytes") or 0)) for one in bars[device].iter("div")]
        assert sum(n_bytes for label, n_bytes in parts if label.startswith("KV cache")) == use.kv_bytes
        assert sum(n_bytes for label, n_bytes in parts if not label.startswith("free")) == use.total_bytes
        assert format_bytes(use.total_bytes) in text_of(bars[device])
    assert f"{forecast.tokens_per_s:.1f} tokens/s" in text_of(page)


def test_a_reply_is_shown(outputs: dict[str, Any], objects: tuple[Plan, ChatReply, Comparison]) -> None:
    """With its whole text and its stats."""
    reply, said = objects[1], text_of(page_of(outputs["reply"]))
    assert reply.text
    assert reply.text in said
    assert str(reply.stats) in said


def test_a_comparison_is_shown(outputs: dict[str, Any], objects: tuple[Plan, ChatReply, Comparison]) -> None:
    """Each model with its speed and size, each answer in its column."""
    comparison, page = objects[2], page_of(outputs["comparison"])
    models, answers = page.iter("table")
    assert len(comparison.models) == 2
    for row, one in zip([*models][1:], comparison.models, strict=True):
        texts = [text_of(cell) for cell in row]
        assert texts[:2] == [one.label, f"{one.tokens_per_second:.2f} tok/s"]
        assert format_bytes(one.info.file_bytes) in texts
    (row,) = [*answers][1:]
    said = [one.answers[0].text.strip() for one in comparison.models]
    assert [text_of(cell) for cell in row] == ["Name a colour.", *said]
