"""Decode gpt-oss shapes with several placements on one GPU, and print what was predicted beside what was measured.

run.sh builds for the GPU and runs this. The weights are random, in a file of memory: no disk is needed, and what stays
on the CPU is mapped, so that it is in RAM once. Whatever opens a device does so in a process of its own: it ends with
all that it took, a failed assertion of llama.cpp ends nothing else, and an RPC server talks to one at a time.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import overspill
from comparison_options import Options, parse
from expert_routes import in_memory
from header_files import HEADERS, Header, Routes, gpt_oss
from model_files import VOCABULARY
from overspill import Forecast, Hardware, Model, ModelInfo, Placement, forecast, plan
from overspill.base.files import replace_json
from overspill.base.host import available_ram_bytes
from overspill.base.tables import plain_table
from overspill.base.units import parse_bytes
from overspill.base.values import Kernels
from overspill.engine.loading import wait_for_pinning
from overspill.placement.device_names import CPU
from plan_cases import placement_of_fit
from quantities.measuring import in_own_process
from upstream_tools import DryRunPlacement, DryRunSettings, NoUpstreamToolsError, build_upstream_tools, upstream_fit

ROOT = Path(__file__).parent.parent.parent
MODELS: dict[str, Callable[[], Header]] = HEADERS | {"gpt-oss-2-layers": partial(gpt_oss, 2, 8, VOCABULARY)}
# A lot of experts and the embedding while they are made; later on KV cache, buffers, Python and CUDA.
BESIDE_WEIGHTS_BYTES = 3 << 30
FAILURES = (overspill.Error, ValueError, OSError, RuntimeError, AssertionError, NoUpstreamToolsError)


@dataclass(frozen=True)
class Run:
    """One load of the model, and one reply."""

    tokens_per_s: float
    first_token_s: float
    tokens: list[int]
    placement: Placement
    device_bytes: int
    ram_bytes: int
    n_splits: int
    seconds_by_device: dict[str, float]
    """Of a token, measured apart, with a wait after each piece of the graph; "moving" is the time between."""


@dataclass
class Row:
    """A placement, and what came of it."""

    name: str
    kernels: Kernels = "auto"
    """Whose products of weights in RAM; forecasts are made with those of ``auto``."""
    placement: Placement | None = None
    outlook: Forecast | None = None
    problem: str | None = None
    fit: DryRunPlacement | None = None
    runs: list[Run] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float | None:
        """The best of all rounds."""
        return max((run.tokens_per_s for run in self.runs), default=None)

    @property
    def first_token_s(self) -> float | None:
        """The best of all rounds."""
        return min((run.first_token_s for run in self.runs), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it; memory, pieces of the graph and tokens are the last round's."""
        last = self.runs[-1] if self.runs else None
        return {
            "name": self.name,
            "kernels": self.kernels,
            "problem": self.problem,
            "tokens_per_s": self.tokens_per_s,
            "tokens_per_s_by_round": [run.tokens_per_s for run in self.runs],
            "first_token_s": self.first_token_s,
            "first_token_s_by_round": [run.first_token_s for run in self.runs],
            "device_bytes": last and last.device_bytes,
            "ram_bytes": last and last.ram_bytes,
            "n_splits": last and last.n_splits,
            "seconds_by_device": last and last.seconds_by_device,
            "tokens": last and last.tokens,
            "forecast": self.outlook and self.outlook.to_dict(),
            "placement": self.placement and self.placement.to_dict(),
            "fit": self.fit and asdict(self.fit),
        }


@dataclass
class PromptRow:
    """A way to read a long prompt with the planner's placement, and what came of it."""

    n_ubatch: int
    holding: str
    """``mapped``, ``registered`` or ``pinned copy``."""
    outlook: Forecast
    problem: str | None = None
    first_token_s: float | None = None
    load_s: float | None = None
    pinning: str = ""
    tokens_per_s: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {
            "n_ubatch": self.n_ubatch,
            "holding": self.holding,
            "problem": self.problem,
            "first_token_s": self.first_token_s,
            "load_s": self.load_s,
            "pinning": self.pinning,
            "tokens_per_s": self.tokens_per_s,
            "forecast": self.outlook.to_dict(),
        }


@dataclass
class Outcome:
    """What came of one model so far."""

    name: str
    problem: str | None = None
    hardware: Hardware | None = None
    rows: list[Row] = field(default_factory=list)
    prompts: list[PromptRow] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {
            "name": self.name,
            "problem": self.problem,
            "hardware": self.hardware and self.hardware.to_dict(),
            "rows": [row.to_dict() for row in self.rows],
            "prompts": [row.to_dict() for row in self.prompts],
        }


def look(options: Options, path: Path | None = None) -> Hardware:
    """Return the device and the CPU, measured for a model if there is one."""
    if options.rpc:
        overspill.add_rpc_server(options.rpc)
    found = [device.name for device in overspill.devices() if device.is_gpu]
    if options.device not in found:
        known = f"must be one of {', '.join(found)}" if found else "is not there, and neither is another GPU"
        raise ValueError(f"--device: {options.device} {known}")
    info = None if path is None else ModelInfo.from_file(path)
    hardware = Hardware.here(
        info, memory={options.device: options.vram}, n_threads=options.threads, measure=path is not None
    )
    cpu = hardware.cpu
    if path is not None:
        # A file in memory counts as used, and is what the model will be mapped from.
        cpu = replace(cpu, memory_bytes=cpu.memory_bytes + path.stat().st_size)
    return replace(hardware, devices=(hardware.device(options.device), cpu))


def measure(path: Path, placement: Placement, kernels: Kernels, options: Options) -> Run:
    """Load a model, let it warm up, and time a greedy reply."""
    if options.rpc:
        overspill.add_rpc_server(options.rpc)
    # As beside a CUDA GPU anyway; elsewhere weights on the CPU would be copied, and what is copied from stays in RAM.
    settings: dict[str, Any] = {"n_ctx": options.n_ctx, "n_threads": options.threads, "repack": "off"}
    with Model(path, offload=placement, kernels=kernels, **settings) as model:
        draw = random.Random(0)
        prompt = [draw.randrange(model.n_vocab) for _ in range(options.prompt_tokens)]
        ends = [token for token in model.special_tokens.values() if model.is_end_of_generation(token)]
        reply = partial(model.generate, prompt, temperature=0.0, logit_bias=dict.fromkeys(ends, -100.0))
        reply(max_tokens=2)
        completion = reply(max_tokens=options.tokens)
        stats = completion.stats
        assert stats.tokens == options.tokens, stats
        assert stats.tokens_per_second is not None
        assert stats.time_to_first_token_s is not None
        cpu = model.memory[CPU]
        # Not the part of the file that is mapped, between whose ends are weights of the GPU as well.
        ram_bytes = model.placement.bytes_by_device()[CPU] + cpu.kv_bytes + cpu.compute_bytes
        device = model.memory.get(options.device)
        return Run(
            stats.tokens_per_second,
            stats.time_to_first_token_s,
            [token.id for token in completion.tokens],
            model.placement,
            device.total_bytes if device else 0,
            ram_bytes,
            stats.breakdown.graph_splits,
            seconds_by_device(model, prompt, [token.id for token in completion.tokens]),
        )


def seconds_by_device(model: Model, prompt: list[int], tokens: list[int]) -> dict[str, float]:
    """Return the seconds of a token by device, to be held against the forecast's terms."""
    times = model._core.time_devices([*prompt, *tokens[:-1]], len(tokens) - 1)
    return {"moving": times.moving_s, **{device: part.seconds for device, part in times.devices.items()}}


HOLDINGS: dict[str, dict[str, Any]] = {
    "mapped": {"pin_weights": "off"},
    "registered": {"pin_weights": "on"},
    "pinned copy": {"load_mode": "read"},
}


def read_prompt(path: Path, placement: Placement, options: Options, row: PromptRow) -> PromptRow:
    """Load a model, wait until its weights are pinned, and time the first token after a long prompt."""
    if options.rpc:
        overspill.add_rpc_server(options.rpc)
    settings: dict[str, Any] = {"n_ctx": options.n_ctx, "n_threads": options.threads, "repack": "off"}
    start = time.perf_counter()
    with Model(path, offload=placement, n_ubatch=row.n_ubatch, **settings, **HOLDINGS[row.holding]) as model:
        load_s = time.perf_counter() - start
        wait_for_pinning(model._core)
        draw = random.Random(0)
        prompt = [draw.randrange(model.n_vocab) for _ in range(row.outlook.settings.prompt_tokens)]
        model.generate(prompt[:64], temperature=0.0, max_tokens=2)
        stats = model.generate(prompt, temperature=0.0, max_tokens=options.tokens).stats
        return replace(
            row,
            first_token_s=stats.time_to_first_token_s,
            load_s=load_s,
            pinning=model.memory[CPU].pinning,
            tokens_per_s=stats.tokens_per_second,
        )


def prompt_rows(path: Path, placement: Placement, hardware: Hardware, options: Options) -> list[PromptRow]:
    """Return the ways to read a prompt that are compared, with forecasts."""
    info = ModelInfo.from_file(path)
    rows = []
    for holding, sizes in (("mapped", (512, 2048, 4096)), ("registered", (2048, 4096)), ("pinned copy", (4096,))):
        for n_ubatch in sizes:
            more = {"load_mode": "read"} if holding == "pinned copy" else {"pin_weights": holding == "registered"}
            settings: dict[str, Any] = {"n_ubatch": n_ubatch, "prompt_tokens": options.long_prompt_tokens, **more}
            outlook = forecast(info, placement, hardware, n_ctx=options.n_ctx, depth=options.depth, **settings)
            rows.append(PromptRow(n_ubatch, holding, outlook))
    return rows


@contextmanager
def model_in_memory(name: str, options: Options, errors: Console, routes: Routes | None = None) -> Iterator[Path]:
    """Write a model into memory; its path is good for other processes too, until the block is left.

    With ``routes``, the id of a token decides which experts it uses.
    """
    header = MODELS[name]()
    needed = header.tensor_bytes + BESIDE_WEIGHTS_BYTES
    if options.rpc:  # whose server may be on this machine
        needed += min(parse_bytes("--vram", options.vram), header.tensor_bytes)
    available = available_ram_bytes()
    if available is not None and needed > available:
        raise ValueError(
            f"{name} needs {needed / 1e9:.1f} GB of RAM, and {available / 1e9:.1f} GB are free: "
            "end other programs, or leave it out with --shape"
        )
    with in_memory(name, header, errors, routes) as path:
        yield path


def whole_layers(info: ModelInfo, hardware: Hardware, options: Options) -> Placement:
    """Return the most whole layers that fit on the device with their KV cache."""
    for n_gpu_layers in range(info.n_layers + 1, 0, -1):
        placement = Placement.from_layers(info, [options.device], n_gpu_layers)
        outlook = forecast(info, placement, hardware, n_ctx=options.n_ctx)
        if not outlook.memory[options.device].missing_bytes:
            return placement
    raise ValueError(f"no layer fits into {options.vram} of {options.device}")


def rows_of(path: Path, hardware: Hardware, options: Options) -> list[Row]:
    """Return the placements to compare, those that fit with a forecast of what is going to be measured."""
    info, device = ModelInfo.from_file(path), options.device
    choices: dict[str, Callable[[Row], Placement]] = {
        "whole layers": lambda row: whole_layers(info, hardware, options),
        "experts on CPU": lambda row: Placement.from_mapping(info, [device], {"default": device, "experts": CPU}),
        "planner": lambda row: plan(info, hardware=hardware, n_ctx=options.n_ctx, n_ubatch=512, experts="static"),
        "llama.cpp's fit": lambda row: fitted(path, info, hardware, options, row),
    }
    rows = [Row(name) for name in choices]
    for row in rows:
        try:
            row.placement = choices[row.name](row)
            row.outlook = forecast(info, row.placement, hardware, n_ctx=options.n_ctx, depth=options.depth)
            if row.outlook.memory[device].missing_bytes:
                row.problem = row.outlook.reason
        except FAILURES as error:
            row.problem = str(error)
    planner = next(row for row in rows if row.name == "planner")
    without = Row("planner, llama.cpp", "llama.cpp", planner.placement, problem=planner.problem)
    return [*rows, without]


def fitted(path: Path, info: ModelInfo, hardware: Hardware, options: Options, row: Row) -> Placement:
    """Return what llama.cpp's fit chooses for a device of this size."""
    tools = build_upstream_tools(ROOT / "build" / "upstream-tools")
    # A stand-in, since the fit would take all of a real one; a placement knows "gpu" as its first GPU.
    memory = {"gpu": hardware.device(options.device).memory_bytes}
    fit = upstream_fit(tools, path, memory, DryRunSettings(n_ctx=options.n_ctx))
    row.fit = fit.placement
    if not fit.success:
        raise ValueError("llama.cpp's fit has found no placement")
    return placement_of_fit(info, hardware, fit)


def compare(outcome: Outcome, options: Options, console: Console, errors: Console, save: Callable[[], None]) -> None:
    """Measure all placements of a model, round after round, so that what slows the machine down slows all of them.

    Then the planner's placement reads a long prompt in several ways. ``save`` is called after each measurement, and
    each table printed as soon as it is complete: what takes too long is ended from outside.
    """
    name, start = outcome.name, time.perf_counter()
    with model_in_memory(name, options, errors) as path, errors.status("") as status:

        def say(text: str) -> None:
            line = f"{name}, after {time.perf_counter() - start:.0f} s: {text}"
            if errors.is_terminal:  # which has one line that changes; a log has many
                status.update(line)
            else:
                errors.print(line)

        say("measuring the hardware")
        hardware = outcome.hardware = in_own_process(look, options, path)
        say("choosing placements")
        rows, info = rows_of(path, hardware, options), ModelInfo.from_file(path)
        outcome.rows = rows
        for number in range(1, options.rounds + 1):
            for row in rows:
                if row.placement is None or row.problem is not None:
                    continue
                say(f"round {number} of {options.rounds}: {row.name}")
                try:
                    row.runs.append(in_own_process(measure, path, row.placement, row.kernels, options))
                except FAILURES as error:
                    row.problem = str(error)
                else:  # less than was planned perhaps, where the device refused memory
                    placement = row.placement = row.runs[-1].placement
                    if row.outlook is not None:
                        row.outlook = forecast(info, placement, hardware, n_ctx=options.n_ctx, depth=options.depth)
                save()
        status.stop()  # a line of its own would be printed into the table
        print_placements(outcome, hardware, options, console)
        status.start()
        planner = next(row for row in rows if row.name == "planner")
        if options.long_prompt_tokens and planner.runs and planner.placement is not None:
            for one in prompt_rows(path, planner.placement, hardware, options):
                say(f"a prompt of {options.long_prompt_tokens}: {one.n_ubatch}, {one.holding}")
                try:
                    outcome.prompts.append(in_own_process(read_prompt, path, planner.placement, options, one))
                except FAILURES as error:
                    outcome.prompts.append(replace(one, problem=str(error)))
                save()
            status.stop()
            print_prompts(outcome, options, console)


def table_of_prompts(rows: list[PromptRow], options: Options) -> Table:
    """Return the table of the ways to read a prompt."""
    heads = ("prompt tok/s\npredicted", "prompt tok/s\nmeasured", "first\ntoken, s", "loading,\ns", "reply\ntok/s")
    shown = plain_table("n_ubatch", "weights in RAM", *heads, left=("weights in RAM",))
    shown.title = f"the planner's placement, a prompt of {options.long_prompt_tokens} tokens"
    shown.title_justify = "left"
    for row in rows:
        cells = [f"{row.outlook.prompt_tokens_per_s:.0f}"]
        if row.first_token_s is not None and row.load_s is not None:
            numbers = (row.first_token_s, row.load_s, row.tokens_per_s or 0.0)
            cells += [f"{options.long_prompt_tokens / row.first_token_s:.0f}", *(f"{one:.1f}" for one in numbers)]
        shown.add_row(str(row.n_ubatch), row.holding, *cells, *["–"] * (5 - len(cells)))
    return shown


def agreement(rows: list[Row]) -> str:
    """Say whether all placements gave the same reply, and where they parted if not."""
    measured = [row for row in rows if row.runs and row.kernels == "auto"]
    if len(measured) < 2:
        return "There are no two replies to compare."
    first, parted = measured[0], []
    tokens = first.runs[-1].tokens
    for row in measured[1:]:
        pairs = zip(tokens, row.runs[-1].tokens, strict=True)
        n_same = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(tokens))
        if n_same < len(tokens):
            parted.append(f"{row.name} parts from {first.name} after {n_same} of {len(tokens)} tokens")
    if not parted:
        return f"All replies are the same {len(tokens)} tokens."
    return f"{'; '.join(parted)}: devices round differently, and random weights make near ties."


def table_of(name: str, hardware: Hardware, rows: list[Row], options: Options) -> Table:
    """Return the table of one model."""
    device = hardware.device(options.device)
    title = f"{name}, {options.n_ctx} tokens of context, {device.memory_bytes / 1e9:.1f} GB of {device.name}"
    speeds = ("tok/s\npredicted", "tok/s\nmeasured", "first\ntoken, s")
    shown = plain_table("placement", *speeds, f"GB on\n{device.name}", "GB in\nRAM", "graph\nsplits")
    shown.title, shown.title_justify = f"{title} ({device.description})", "left"
    for row in rows:
        cells = ["–" if row.outlook is None else f"{row.outlook.tokens_per_s:.2f}"]
        if row.runs:
            last = row.runs[-1]
            numbers = (row.tokens_per_s, row.first_token_s, last.device_bytes / 1e9, last.ram_bytes / 1e9)
            cells += [*(f"{number:.2f}" for number in numbers), str(last.n_splits)]
        shown.add_row(row.name, *cells, *["–"] * (6 - len(cells)))
    return shown


def print_placements(outcome: Outcome, hardware: Hardware, options: Options, console: Console) -> None:
    """Print the table of the placements, and what there is to say about it."""
    console.print(table_of(outcome.name, hardware, outcome.rows, options))
    for row in outcome.rows:
        if row.problem is not None:
            console.print(f"{row.name}: {row.problem}", markup=False, soft_wrap=True)
    console.print(agreement(outcome.rows), markup=False, soft_wrap=True)
    if hardware.source == "assumed":
        console.print("Not everything could be measured of the hardware: predictions rest on assumptions, too.")


def print_prompts(outcome: Outcome, options: Options, console: Console) -> None:
    """Print the table of the ways to read a prompt."""
    console.print(table_of_prompts(outcome.prompts, options))
    for one in outcome.prompts:
        for text in filter(None, (one.problem, one.pinning)):
            console.print(f"{one.n_ubatch}, {one.holding}: {text}", markup=False, soft_wrap=True)


def main() -> int:
    """Compare; return the exit status, 1 if there is a model that could not be compared at all."""
    options = parse()
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    try:
        in_own_process(look, options)
    except FAILURES as error:
        errors.print(f"error: {error}", markup=False, soft_wrap=True)
        return 1
    outcomes: list[Outcome] = []

    def save(*, is_complete: bool = False) -> None:
        if options.json is None:
            return
        result = {
            "overspill": overspill.__version__,
            "options": {name: value for name, value in asdict(options).items() if name != "json"},
            "models": [one.to_dict() for one in outcomes],
        }
        if not options.json.exists() or options.json.is_file():
            replace_json(options.json, result)
        elif is_complete:  # into a pipe or a terminal
            options.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    status = 0
    for name in options.shapes:
        outcome = Outcome(name)
        outcomes.append(outcome)
        try:
            compare(outcome, options, console, errors, save)
        except FAILURES as error:
            errors.print(f"error: {error}", markup=False, soft_wrap=True)
            outcome.problem, status = str(error), 1
    save(is_complete=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
