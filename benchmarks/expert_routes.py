"""Decode a trace of experts' routes with a placement, and show what came of it."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from header_files import Header, Routes, write_random_model
from overspill import Hardware, Model, ModelInfo, Plan, plan
from overspill.base.tables import plain_table
from overspill.base.values import Experts, Kernels
from overspill.engine.loading import wait_for_pinning
from overspill.planning.forecast import Estimate
from quantities.measuring import N_THREADS
from upstream_tools import stand_in_gpu

N_CTX, STAND_IN_BYTES = 4096, 16 << 30
SHAPE: dict[str, Any] = {"n_layers": 24, "n_experts": 32, "n_vocab": 4096, "n_heads": 2, "n_heads_kv": 1}


@dataclass(frozen=True)
class Row:
    """A way to hold the experts in so much memory, and what came of it."""

    vram: str
    experts: Experts
    kernels: Kernels = "auto"
    predicted_tokens_per_s: float = 0.0
    expected_hit_share: float | None = None
    tokens_per_s: tuple[float, ...] = ()
    """Of each pass over the trace."""
    hit_share: tuple[float, ...] = ()
    insertions_per_token: tuple[float, ...] = ()
    predicted_with_hits: float | None = None
    """Tokens per second that are predicted with the hits of the last pass."""
    predicted_over_measured: float | None = None
    is_off: bool = False
    problem: str | None = None

    @property
    def name(self) -> str:
        """What it is, in a few words."""
        return self.experts if self.kernels == "auto" else f"{self.experts}, {self.kernels}"


@contextmanager
def in_memory(name: str, header: Header, errors: Console, routes: Routes | None = None) -> Iterator[Path]:
    """Write a header's model with random weights into memory; the path is good for other processes too.

    It is gone when the block is left. With ``routes``, the id of a token decides which experts it uses.
    """
    descriptor = os.memfd_create(name)
    try:
        path = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=errors, transient=True) as progress:
            task = progress.add_task(f"writing {name} into memory", total=header.tensor_bytes)
            # A vocabulary takes long to write, and a trace has none.
            vocabulary = routes is None
            write_random_model(
                path, header, lambda n_bytes: progress.advance(task, n_bytes), vocabulary=vocabulary, routes=routes
            )
        yield path
    finally:
        os.close(descriptor)


def decode_routes(
    path: Path, planned: Plan, row: Row, routes: Routes, n_passes: int, *, n_ctx: int, n_threads: int | None
) -> Row:
    """Load a model, decode the trace several times from an empty cache, and return the row with its speeds.

    In a process of its own: what would be remembered of the model is neither found nor kept.
    """
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
    n = len(routes)
    order = itertools.islice(itertools.cycle(range(n)), 1, None)
    settings: dict[str, Any] = {"n_ctx": n_ctx, "n_threads": n_threads, "kernels": row.kernels}
    settings["pin_weights"] = "on" if planned.expert_cache else "off"
    with Model(path, offload=planned, repack="off", **settings) as model:
        wait_for_pinning(model._core)
        stream = model.stream([0], max_tokens=n * n_passes + 1, sampler=lambda logits, tokens: next(order))
        next(stream)
        speeds, hits, insertions = [], [], []
        before, start = stream.stats.experts, time.perf_counter()
        for i, _ in enumerate(stream, 1):
            if i % n:
                continue
            now, end = stream.stats.experts, time.perf_counter()
            speeds.append(n / (end - start))
            if now is not None and before is not None:
                hits.append((now.hits - before.hits) / max(1, now.requests - before.requests))
                insertions.append((now.insertions - before.insertions) / n)
            before, start = now, time.perf_counter()
        row = replace(
            row,
            tokens_per_s=tuple(speeds),
            hit_share=tuple(hits),
            insertions_per_token=tuple(insertions),
            is_off=before is not None and before.is_off,
        )
        return replace(row, predicted_with_hits=predicted_with_hits(planned, planned.hardware, row))


def predicted_with_hits(planned: Plan, hardware: Hardware, row: Row) -> float:
    """Return the tokens per second to expect with the hits and copies of the last pass."""
    estimate = Estimate.of(planned.info, planned, hardware, planned.settings)
    if row.hit_share:
        estimate = replace(estimate, hit_share=row.hit_share[-1], insertions=row.insertions_per_token[-1])
    return estimate.forecast.tokens_per_s


def print_rows(rows: list[Row], title: str, console: Console) -> None:
    """Print a table of what was measured so far."""
    heads = (
        "tok/s\npredicted",
        "tok/s,\npasses",
        "hits\nexpected",
        "hits,\npasses",
        "copied\na token",
        "tok/s, with\nthose hits",
        "predicted/\nmeasured",
    )
    shown = plain_table("memory", "experts", *heads, left=("memory", "experts"))
    shown.title, shown.title_justify = title, "left"
    for row in rows:
        shown.add_row(
            row.vram,
            row.name + (" (off)" if row.is_off else ""),
            f"{row.predicted_tokens_per_s:.1f}",
            ", ".join(f"{one:.1f}" for one in row.tokens_per_s) or "–",
            "–" if row.expected_hit_share is None else f"{row.expected_hit_share:.2f}",
            ", ".join(f"{one:.2f}" for one in row.hit_share) or "–",
            ", ".join(f"{one:.1f}" for one in row.insertions_per_token) or "–",
            "–" if row.predicted_with_hits is None else f"{row.predicted_with_hits:.1f}",
            "–" if row.predicted_over_measured is None else f"{row.predicted_over_measured:.2f}",
        )
    console.print(shown)
    for row in rows:
        if row.problem is not None:
            console.print(f"{row.vram}, {row.name}: {row.problem}", markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Placed:
    """A placement, with a name."""

    experts: Experts
    planned: Plan


def _add_stand_in(tools: Path) -> None:
    """Have the GPU in this process: experts at 1 TB/s, the link at 25 GB/s, 40 µs for a visit of three steps."""
    stand_in_gpu(tools, "GPU0", STAND_IN_BYTES, link_bytes_per_s=25e9, latency_s=13e-6, expert_bytes_per_s=1e12)


def placements_beside_stand_in(tools: Path, path: Path, resident: float, depth: int) -> list[Placed]:
    """Return both placements for a GPU with room for so many of the experts beside everything else."""
    _add_stand_in(tools)
    info = ModelInfo.from_file(path)
    hardware = Hardware.here(info, n_threads=N_THREADS)
    how: dict[str, Any] = {"n_ctx": N_CTX, "n_ubatch": 512, "depth": depth}
    pins = {"attention": "gpu", "dense": "gpu", "kv": "gpu", "output": "gpu"}
    bare = (
        plan(info, hardware=hardware, pins=pins | {"experts": "cpu"}, experts="static", **how).forecast().memory["GPU0"]
    )
    experts_bytes = sum(info.layers[layer]["experts"] for layer in info.expert_layers)
    room = bare.total_bytes + bare.margin_bytes + int(resident * experts_bytes)
    gpu = replace(hardware.gpus[0], memory_bytes=room)
    limited = replace(hardware, devices=(gpu, hardware.cpu))
    choices: tuple[Experts, ...] = ("static", "cached")
    return [Placed(one, plan(info, hardware=limited, pins=pins, experts=one, **how)) for one in choices]


def decode_beside_stand_in(tools: Path, path: Path, placed: Placed, routes: Routes, n_passes: int) -> Row:
    """Decode the routes with a placement."""
    _add_stand_in(tools)
    outlook = placed.planned.forecast()
    expected = None if outlook.experts is None else outlook.experts.hit_share
    row = Row(
        f"{outlook.memory['GPU0'].free_bytes / 1e9:.1f} GB", placed.experts, "auto", outlook.tokens_per_s, expected
    )
    row = decode_routes(path, placed.planned, row, routes, n_passes, n_ctx=N_CTX, n_threads=N_THREADS)
    # Others use the machine's memory as well, at one time more than at another.
    hardware = Hardware.here(placed.planned.info, n_threads=N_THREADS, refresh=True)
    return replace(row, predicted_with_hits=predicted_with_hits(placed.planned, hardware, row))


def stream_together_beside_stand_in(
    tools: Path, path: Path, planned: Plan, routes: Routes, *, n: int, n_parallel: int, n_tokens: int, n_passes: int
) -> list[float]:
    """Return the tokens per second of each pass, in which so many threads stream, each along a part of the routes."""
    _add_stand_in(tools)
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
    settings: dict[str, Any] = {"n_ctx": 2 * n_tokens, "n_threads": N_THREADS, "repack": "off"}
    settings["pin_weights"] = "on" if planned.expert_cache else "off"
    with Model(path, offload=planned, n_parallel=n_parallel, **settings) as model:
        wait_for_pinning(model._core)

        def stream(number: int) -> int:
            first = number * len(routes) // n
            order = itertools.islice(itertools.cycle(range(len(routes))), first + 1, None)
            tokens = model.stream([first], max_tokens=n_tokens, sampler=lambda logits, tokens: next(order))
            return sum(1 for _ in tokens)

        speeds = []
        for _ in range(n_passes):
            start = time.perf_counter()
            with ThreadPoolExecutor(n) as pool:
                assert sum(pool.map(stream, range(n))) == n * n_tokens
            speeds.append(n * n_tokens / (time.perf_counter() - start))
        return speeds
