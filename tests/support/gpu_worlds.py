"""Tests without a GPU, and tests on a GPU, whatever this machine has: the fixtures ``no_gpu`` and ``gpu``.

A process cannot be rid of a device, and what one test adds all others see. So GPUs are hidden from the tests and from
what they start: a test that says nothing about GPUs has the CPU's rounding, threads, memory and speed. Tests that ask
for ``gpu`` run in a child, which is pytest again, one for each file. It sees the GPU, or a stand-in where there is
none. If a failed assertion of llama.cpp ends it, one test has failed, and another child goes on.

``OVERSPILL_TEST_BESIDE_GPU=1 pytest`` hides nothing, and every test runs beside a GPU or its stand-in. Then those that
ask for ``no_gpu`` run in a child.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from gpu_visibility import REPORTS, WORLD, gpu_environment, gpus_here
from programs import WITHOUT_GPU

# --- fixtures ------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu() -> None:
    """Run the test where no GPU is visible."""
    assert not gpus_here()


@pytest.fixture(scope="session")
def gpu() -> str:
    """Run the test where there is a GPU, or a stand-in for one; return its name."""
    return gpus_here()[0]


def world_of(item: pytest.Item) -> str | None:
    """Return the fixture that the test asks for."""
    names = getattr(item, "fixturenames", ())
    return next((world for world in ("gpu", "no_gpu") if world in names), None)


# --- children ------------------------------------------------------------------------------------

Reports = dict[str, list[pytest.TestReport]]
_reports = pytest.StashKey[Reports]()


def made_up(item: pytest.Item, outcome: str, reason: str) -> pytest.TestReport:
    """Return the report on a test that could not run, or that has not come to its end."""
    text: Any = reason if outcome == "failed" else (str(item.path), (item.location[1] or 0) + 1, f"Skipped: {reason}")
    return pytest.TestReport(item.nodeid, item.location, {}, outcome, text, "call")  # type: ignore[arg-type]


def run_child(config: pytest.Config, items: list[pytest.Item], environment: dict[str, str]) -> tuple[Reports, str]:
    """Run tests in a pytest of their own; return the reports, and the end of what it printed."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(config.rootpath),
    ]
    command += [item.nodeid for item in items]
    reports: Reports = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "reports"
        file.touch()
        environment = {**environment, REPORTS: str(file)}
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env=environment,
            cwd=config.rootpath,
        )
        for line in file.read_text(encoding="utf-8").splitlines():
            report = config.hook.pytest_report_from_serializable(config=config, data=ast.literal_eval(line))
            reports.setdefault(report.nodeid, []).append(report)
    return reports, f"the child ended with {done.returncode}:\n{done.stdout[-3000:]}"


def run_children(config: pytest.Config, items: list[pytest.Item], world: str) -> Reports:
    """Run tests in one child, or in more if it ends in the middle; return the reports on all of them."""
    from upstream_tools import NoUpstreamToolsError

    reports: Reports = {}
    try:
        environment = {**(gpu_environment() if world == "gpu" else {**os.environ, **WITHOUT_GPU}), WORLD: world}
    except NoUpstreamToolsError as error:
        return {item.nodeid: [made_up(item, "skipped", f"there is no GPU here: {error}")] for item in items}
    while items:
        found, printed = run_child(config, items, environment)
        reports |= found
        ended = {name for name, parts in found.items() if parts[-1].when == "teardown"}
        items = [item for item in items if item.nodeid not in ended]
        if items and not found:  # it did not even begin
            reports |= {item.nodeid: [made_up(item, "failed", printed)] for item in items}
            break
        if items:
            first = items.pop(0)
            reports.setdefault(first.nodeid, []).append(made_up(first, "failed", printed))
    return reports


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run a test of another world, and those of its file, in a child; report on it here."""
    world = world_of(item)
    if world is None or WORLD in os.environ or (world == "no_gpu" and not gpus_here()):
        return None
    kept = item.config.stash.setdefault(_reports, {})
    if item.nodeid not in kept:
        together = [one for one in item.session.items if one.path == item.path and world_of(one) == world]
        kept |= run_children(item.config, together, world)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in kept.pop(item.nodeid):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # What tests before it have set up, and none after it needs.
    item.session._setupstate.teardown_exact(nextitem)
    return True


class _Reporter:
    """Writes the reports of a child for its parent."""

    def __init__(self, config: pytest.Config, file: Path) -> None:
        self._config = config
        self._file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write it at once, since this process may end in the next test."""
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"{data!r}\n")  # JSON would make lists of its tuples


def pytest_configure(config: pytest.Config) -> None:
    """Report to the parent."""
    if WORLD in os.environ:
        config.pluginmanager.register(_Reporter(config, Path(os.environ.pop(REPORTS))))


def pytest_sessionstart() -> None:
    """Look for GPUs: a build for them that finds none logs so once, and in no test."""
    gpus_here()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let ``-m gpu`` select what runs on a GPU."""
    for item in items:
        if world_of(item) == "gpu":
            item.add_marker("gpu")
