"""How long it takes until a model can be used, until a plan is there, and until the package is imported."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import overspill
from quantities import rivals
from quantities.measuring import N_THREADS, Round, Timed, in_turn

GIB = 1 << 30
IMPORT_MODULES = Path(__file__).resolve().parent.parent / "scripts" / "import_modules.py"


@contextmanager
def loading(path: Path, tools: Path | None = None) -> Iterator[Round]:
    """Yield rounds of loading a file in the page cache, header, plan and read-back included; the rival is llama.cpp.

    The answer is the greedy token after a few, which is not timed.
    """
    prompt = [1, 2, 3]

    def ours() -> Timed:
        start = time.perf_counter()
        with overspill.Model(path, n_ctx=1024, n_threads=N_THREADS) as model:
            seconds = time.perf_counter() - start
            return Timed([seconds], int(model.eval(prompt).argmax()))

    def llama_cpp(tools: Path) -> Timed:
        start = time.perf_counter()
        with rivals.minimal_loop(tools, path) as loop:
            seconds = time.perf_counter() - start
            return Timed([seconds], loop.greedy(prompt, 1)[0])

    yield in_turn(ours, None if tools is None else lambda: llama_cpp(tools))


@contextmanager
def importing(modules: str | None = None) -> Iterator[Round]:
    """Yield rounds of importing overspill; the rival are modules, named as in ``numpy,rich.console``."""
    yield in_turn(lambda: _import_time("overspill"), None if modules is None else lambda: _import_time(modules))


def _import_time(modules: str) -> Timed:
    """Return the time of importing modules in a new interpreter."""
    # As this one: without `site`, an editable install's import hook does not come before every path.
    flags = ["-S"] if sys.flags.no_site else []
    command = [sys.executable, *flags, str(IMPORT_MODULES), *modules.split(",")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return Timed([float(done.stdout)])


@contextmanager
def planning(header: Path, tools: Path | None = None, *, vram_gib: int) -> Iterator[Round]:
    """Yield rounds of a plan, from the file's header on; the rival is llama.cpp's fit.

    The answers are the tokens per second that are forecast of both placements: ours are fewer by 2 % at most, which a
    plan may give up for prompts.
    """
    hardware = overspill.Hardware.given(ram=128 * GIB, vram=vram_gib * GIB)

    def ours() -> Timed:
        start = time.perf_counter()
        plan = overspill.plan(overspill.ModelInfo.from_file(header), hardware=hardware, n_ctx=8192)
        seconds = time.perf_counter() - start
        return Timed([seconds], round(plan.forecast().tokens_per_s, 6))

    def fit(tools: Path) -> Timed:
        from plan_cases import placement_of_fit
        from upstream_tools import upstream_fit

        found = upstream_fit(tools, header, {"GPU0": vram_gib * GIB})
        info = overspill.ModelInfo.from_file(header)
        outlook = overspill.forecast(info, placement_of_fit(info, hardware, found), hardware, n_ctx=8192)
        return Timed([found.seconds], outlook.tokens_per_s)

    def check(ours: float, fits: float) -> None:
        assert ours >= 0.98 * fits, f"a plan of {ours:.2f} tokens/s, llama.cpp's fit of {fits:.2f}"

    yield in_turn(ours, None if tools is None else lambda: fit(tools), check)
