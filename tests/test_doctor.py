"""What the doctor finds, on this machine and from the files of others."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from header_files import write_header
from overspill import Device, Hardware, plan
from overspill.doctor import Finding, Readings, diagnose, examine, read_machine

GIB = 2**30
CUDA = Device("CUDA0", "RTX 3090", "gpu", "CUDA", 23 * GIB, 24 * GIB)
CPU = Device("CPU", "a CPU", "cpu", "CPU", 100 * GIB, 128 * GIB)
GOOD = Readings(
    frozenset({"sse4_2", "avx2", "avx512f"}),
    {"AVX2": "1", "AVX512": "1"},
    [CUDA, CPU],
    ["CUDA"],
    8,
    0.1,
    128 * GIB,
    0,
)


def by_title(findings: list[Finding]) -> dict[str, Finding]:
    """Return them by what they are about."""
    assert len({finding.title for finding in findings}) == len(findings)
    return {finding.title: finding for finding in findings}


def test_a_good_machine() -> None:
    """Nothing to do, and a reading for everything."""
    for finding in diagnose(GOOD):
        assert finding.severity == "fine", finding
        assert finding.reading
        assert not finding.advice


@pytest.mark.parametrize(
    ("changes", "n_threads", "title", "severity", "reading"),
    [
        ({"build_features": {"AVX": "1"}}, None, "instruction sets of the CPU", "bad", "AVX2, AVX512, which the build"),
        ({"build_features": {"AVX2": "1"}}, None, "instruction sets of the CPU", "warning", "the CPU has AVX512,"),
        ({"devices": [CPU]}, None, "GPU", "bad", "the build has CUDA, and finds no GPU"),
        ({}, 16, "threads", "warning", "16 threads on 8 physical cores"),
        ({"load_average": 6.0}, None, "other programs", "warning", "load 6.0 on 8 cores"),
        ({"swap_used_bytes": 8 * GIB}, None, "swap", "warning", "8.0 GiB of swap in use"),
    ],
)
def test_each_thing_that_is_wrong(
    changes: dict[str, Any], n_threads: int | None, title: str, severity: str, reading: str
) -> None:
    """Is found alone, with its figure, and with what to do."""
    findings = by_title(diagnose(replace(GOOD, **changes), n_threads=n_threads))
    assert [name for name, finding in findings.items() if finding.severity != "fine"] == [title]
    assert findings[title].severity == severity
    assert reading in findings[title].reading
    assert findings[title].advice


def test_experts_and_ram(tmp_path: Path) -> None:
    """Experts that RAM cannot hold are bad; that mapped ones cannot be pinned is worth a word."""
    path = write_header(tmp_path / "model.gguf", "gpt-oss-120b")
    hardware = Hardware.given(vram="24GiB", ram="128GiB")
    gpu = replace(hardware.gpus[0], name="CUDA0")
    enough = plan(path, hardware=replace(hardware, devices=(gpu, hardware.cpu))).forecast()
    findings = by_title(diagnose(GOOD, enough))
    assert findings["RAM"].severity == "fine"
    assert findings["pinned memory"].severity == "warning"
    assert 'load_mode="read"' in findings["pinned memory"].advice
    little = replace(hardware.cpu, memory_bytes=30 * GIB)
    short = plan(path, hardware=replace(hardware, devices=(gpu, little))).forecast()
    finding = by_title(diagnose(GOOD, short))["RAM"]
    assert finding.severity == "bad"
    assert "of which 30.0 GiB are free" in finding.reading
    assert "read from the disk again for every token" in finding.advice


def test_readings_of_another_machine(tmp_path: Path) -> None:
    """From files as Linux has them; without them, nothing is made up."""
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu sse2 avx2\nbogomips\t: 1\n")
    (proc / "meminfo").write_text("MemTotal:  1000 kB\nSwapTotal:  500 kB\nSwapFree:  200 kB\n")
    (proc / "loadavg").write_text("3.25 1.00 0.50 1/100 1234\n")
    readings = read_machine(tmp_path)
    assert readings.cpu_flags == {"fpu", "sse2", "avx2"}
    assert readings.load_average == 3.25
    assert (readings.ram_bytes, readings.swap_used_bytes) == (1000 * 1024, 300 * 1024)
    nothing = read_machine(tmp_path / "nowhere")
    assert not nothing.cpu_flags
    assert diagnose(nothing)[0].reading == "not known on this system"


def test_this_machine(tiny_gpt_oss_path: Path) -> None:
    """The build is for this CPU, and the tiny model fits; the command line says the same."""
    findings = by_title(examine(tiny_gpt_oss_path, n_ctx=512))
    assert findings["instruction sets of the CPU"].severity == "fine"
    assert findings["RAM"].severity == "fine"
    command = [sys.executable, "-m", "overspill", "doctor", str(tiny_gpt_oss_path), "--ctx", "512"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(title in shown for title in findings)
    told = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert [entry["title"] for entry in told] == list(findings)
