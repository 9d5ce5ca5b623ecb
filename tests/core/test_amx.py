"""AMX, which GCC before 14 miscompiles: cmake/amx_tile_config.h has to cure that."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HEADER = Path(__file__).parents[2] / "cmake" / "amx_tile_config.h"

# Assembles into an "instruction" that any x86-64 CPU can execute: it keeps the 64 bytes that ldtilecfg would read.
SPY = r"""
#include <cstdio>
#include <immintrin.h>

unsigned char seen[80];
asm(R"(
    .macro ldtilecfg config:vararg
        movq %rax, seen+64(%rip)
        movq %rcx, seen+72(%rip)
        leaq \config, %rax
        .irp offset, 0, 8, 16, 24, 32, 40, 48, 56
            movq \offset(%rax), %rcx
            movq %rcx, seen+\offset(%rip)
        .endr
        movq seen+64(%rip), %rax
        movq seen+72(%rip), %rcx
    .endm
)");

// As ggml does it.
struct TileConfig {
    unsigned char palette_id = 1;
    unsigned char start_row = 0;
    unsigned char reserved[14] = {};
    unsigned short bytes_per_row[16] = {};
    unsigned char rows[16] = {};
};

__attribute__((noinline)) void configure() {
    alignas(64) TileConfig config;
    for (int i = 0; i < 8; ++i) {
        config.bytes_per_row[i] = 64;
        config.rows[i] = 16;
    }
    _tile_loadconfig(&config);
}

int main() {
    configure();
    for (int i = 0; i < 64; ++i) {
        std::printf("%02x", seen[i]);
    }
}
"""

CONFIGURATION = bytes([1, 0]) + bytes(14) + bytes([64, 0] * 8) + bytes(16) + bytes([16] * 8) + bytes(8)

GENERATE = """
import logging, sys
import overspill

logging.basicConfig(level=logging.DEBUG, format="%(message)s")
with overspill.Model(sys.argv[1], offload="cpu", n_ctx=256) as model:
    reply = model.generate("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,", max_tokens=12, temperature=0)
print(*[token.id for token in reply.tokens])
"""

# " 12, 13, 14,", as Gemma 3 270M goes on without AMX; it is at least 86 % sure of each token.
EXPECTED = [236743, 236770, 236778, 236764, 236743, 236770, 236800, 236764, 236743, 236770, 236812, 236764]


def gcc() -> str:
    """Return GCC's C++ compiler for x86-64, or skip the test."""
    compiler = shutil.which("g++")
    if sys.platform != "linux" or platform.machine() != "x86_64" or compiler is None:
        pytest.skip("needs g++ on x86-64 Linux")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    if "Free Software Foundation" not in version:
        pytest.skip("g++ is not GCC here")
    return compiler


def configuration_that_arrives(folder: Path, *options: str) -> bytes:
    """Compile a program that configures AMX's tiles; return the bytes that reach the instruction."""
    (folder / "spy.cpp").write_text(SPY)
    program = folder / "spy"
    command = [gcc(), "-O3", "-mamx-tile", *options, str(folder / "spy.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)
    return bytes.fromhex(subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout)


def test_the_whole_tile_configuration_reaches_the_cpu(tmp_path: Path) -> None:
    """All 64 bytes are in memory when they are loaded."""
    assert configuration_that_arrives(tmp_path, f"--include={HEADER}") == CONFIGURATION


def test_the_spy_notices_the_miscompilation(tmp_path: Path) -> None:
    """Without our header the bytes are lost by GCC before 14, so the test above can fail."""
    version = subprocess.run([gcc(), "-dumpversion"], capture_output=True, text=True, check=True).stdout
    if int(version.partition(".")[0]) >= 14:
        pytest.skip("this GCC is not affected")
    assert configuration_that_arrives(tmp_path) != CONFIGURATION


def test_amx_generates_the_tokens_of_other_cpus(gemma_path: Path) -> None:
    """Greedy tokens are those of a CPU without AMX; in a process of its own, since the bug ends one with SIGILL."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.is_file() else []
    if not {"amx_int8", "amx_tile"} <= set(flags):
        pytest.skip("this CPU has no AMX")
    done = subprocess.run([sys.executable, "-c", GENERATE, str(gemma_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "AMX model buffer size" in done.stderr, "AMX was not used"
    assert [int(token) for token in done.stdout.split()] == EXPECTED
