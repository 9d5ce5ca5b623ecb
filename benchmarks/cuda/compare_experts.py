"""Decode gpt-oss along real routes of experts with the planner's static placement and with a cache of experts.

``compare_experts.py [--routes FILE.npz] [OPTION ...]``, with the options of ``compare_placements.py`` where they apply.
The model's router follows the token: its id decides the experts of each layer, as a row of the trace has them. FILE
holds an array of shape (tokens, layers, experts of a token), whose first layers and experts are taken; without it the
routes are made up, and stay with an expert of the token before by 44 %. The trace is decoded several times, in one
context, from an empty cache.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from compare_placements import FAILURES, look, model_in_memory
from comparison_options import Options
from expert_routes import Row, decode_routes, print_rows
from header_files import HEADERS, Routes
from overspill import ModelInfo, plan
from overspill.base.values import Experts, Kernels
from quantities.measuring import in_own_process
from routed_models import markov_routes


def routes_of(file: Path | None, header_keys: dict[str, Any], n_tokens: int) -> Routes:
    """Return the routes of so many tokens at most, in the shape of a model."""
    n_layers, n_used = header_keys["block_count"], header_keys["expert_used_count"]
    if file is None:
        return markov_routes(n_tokens, n_layers, header_keys["expert_count"], n_used)
    with np.load(file) as arrays:
        routes = np.concatenate([arrays[name] for name in sorted(arrays.files)])
    return routes[:n_tokens, :n_layers, :n_used].astype(np.uint16)


def compare(
    name: str,
    routes: Routes,
    n_passes: int,
    memory: list[str],
    options: Options,
    console: Console,
    save: Callable[[list[Row]], None],
) -> None:
    """Measure static and cached experts for each size of the device's memory."""
    start = time.perf_counter()
    more: dict[str, Any] = {"n_ctx": options.n_ctx, "n_threads": options.threads}
    with model_in_memory(name, options, console, routes) as path:
        rows: list[Row] = []
        for vram in memory:
            console.print(f"after {time.perf_counter() - start:.0f} s: {vram}, measuring the hardware", style="dim")
            options = replace(options, vram=vram)
            hardware = in_own_process(look, options, path)
            info = ModelInfo.from_file(path)
            choices: list[tuple[Experts, Kernels]] = [("static", "auto"), ("cached", "auto")]
            for experts, kernels in choices:
                row = Row(vram, experts, kernels)
                console.print(f"after {time.perf_counter() - start:.0f} s: {vram}, {row.name}", style="dim")
                try:
                    depth = min(options.n_ctx, len(routes) * n_passes // 2)
                    planned = plan(
                        info, hardware=hardware, n_ctx=options.n_ctx, depth=depth, n_ubatch=512, experts=experts
                    )
                    outlook = planned.forecast()
                    expected = None if outlook.experts is None else outlook.experts.hit_share
                    row = replace(row, predicted_tokens_per_s=outlook.tokens_per_s, expected_hit_share=expected)
                    row = in_own_process(decode_routes, path, planned, row, routes, n_passes, **more)
                except FAILURES as error:
                    row = replace(row, problem=str(error))
                rows.append(row)
                save(rows)
                print_rows(rows, f"{len(routes)} tokens of a trace; {hardware.gpus[0].description}", console)


def main() -> int:
    """Compare, and return 1 if something could not be measured."""
    parser = ArgumentParser(description="Compare static placements of experts with a cache of them.")
    add = parser.add_argument
    add("--shape", choices=("gpt-oss-20b", "gpt-oss-120b", "gpt-oss-2-layers"), default="gpt-oss-120b")
    add("--routes", type=Path, metavar="FILE.npz", help="a trace; default: made up")
    add("--tokens", type=int, default=512, metavar="N", help="of the trace at most; default: %(default)s")
    add("--passes", type=int, default=2, metavar="N", help="over the trace; default: %(default)s")
    add("--vram", action="append", metavar="SIZE", help="of the device, may be given again; default: 24GB and 8GB")
    add("--device", default="CUDA0", metavar="NAME", help="default: %(default)s")
    add("--n-ctx", type=int, default=4096, metavar="N", help="tokens of context; default: %(default)s")
    add("--threads", type=int, metavar="N", help="of the CPU; default: its physical cores")
    add("--json", type=Path, metavar="FILE", help="write everything to this file, too")
    given = parser.parse_args()
    memory = given.vram or ["24GB", "8GB"]
    options = Options(
        [given.shape], given.device, None, memory[0], given.n_ctx, 1, 0, given.tokens, 1, given.threads, given.json
    )
    console = Console(highlight=False, width=120)
    header = HEADERS.get(given.shape)
    keys = header().keys if header is not None else {"block_count": 2, "expert_used_count": 4, "expert_count": 8}
    routes = routes_of(given.routes, keys, given.tokens)
    done: list[Row] = []

    def save(rows: list[Row]) -> None:
        done[:] = rows
        if options.json is not None:
            options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")

    compare(given.shape, routes, given.passes, memory, options, console, save)
    return 1 if any(row.problem for row in done) else 0


if __name__ == "__main__":
    sys.exit(main())
