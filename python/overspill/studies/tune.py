"""The search for the settings that decode fastest: from the plan on, each is tried in turn."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from overspill._core import Error, cpu_kernels
from overspill.base.checks import as_function, as_integer, as_list, as_real, shown
from overspill.base.host import logical_cpus, physical_cores
from overspill.base.text import short_repr
from overspill.base.units import format_count, parse_memory
from overspill.base.values import CacheType
from overspill.engine.loading import wait_for_pinning
from overspill.engine.model import Model
from overspill.header.info import ModelInfo
from overspill.header.kv_cache import CACHE_TYPES
from overspill.header.tensor_names import part_of
from overspill.machine.devices import add_rpc_servers, devices
from overspill.machine.hardware import Hardware
from overspill.placement.placement import Placement
from overspill.planning.plan import Plan, plan
from overspill.planning.prompt import NEVER_TAKEN_OVER
from overspill.planning.settings import PROMPT_TOKENS, REPLY_TOKENS
from overspill.planning.tuned import SETTINGS, save_tuned, tuned_speed

__all__ = ["Trial", "Tuned", "tune"]

logger = logging.getLogger("overspill")

_PROMPT_TOKENS, _TOKENS, _ROUNDS = 8, 32, 2
_LEAST_BATCHES = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_NOISE = 0.02
_MARGIN_BYTES, _SMALLEST_MARGIN_BYTES = 1 << 30, 256 << 20  # that a plan leaves on a GPU, and that a trial may


@dataclass(frozen=True, slots=True)
class Trial:
    """One setting that was tried, with its measured speed."""

    setting: str
    """A keyword of :class:`overspill.Model`, ``"placement"``, or ``"plan"`` for the first trial."""
    value: str
    state: Literal["measuring", "kept", "not faster", "failed"]
    tokens_per_s: float | None = None
    """None while it is measured, and if it failed."""
    problem: str = ""
    """Why it failed."""
    prompt_tokens_per_s: float | None = None
    """Measured beside a GPU only."""


@dataclass(frozen=True)
class Tuned:
    """The fastest placement and settings that :func:`tune` found, and all trials."""

    trials: tuple[Trial, ...]
    placement: Placement
    settings: dict[str, Any]
    """Keywords of :class:`overspill.Model`."""
    tokens_per_s: float
    planned_tokens_per_s: float
    """The plan's speed, for comparison."""
    prompt_tokens_per_s: float | None
    """Measured beside a GPU only."""
    planned_prompt_tokens_per_s: float | None
    stopped: Literal["", "interrupted", "out of time"] = ""
    """Why not everything was tried."""
    file: Path | None = None
    """The file that keeps it; None if it could not be written, or if an earlier, complete run found faster settings."""

    def __repr__(self) -> str:
        """Return the speeds and the settings in brackets."""
        trials = format_count(len(self.trials), "trial")
        speeds = f"{self.tokens_per_s:.2f} tokens/s, planned {self.planned_tokens_per_s:.2f}"
        return short_repr(self, f"{speeds}, {trials}: {self.settings}")

    @property
    def options(self) -> dict[str, Any]:
        """Keywords for :class:`overspill.Model`: the placement as ``offload``, and the settings."""
        return {"offload": self.placement, **self.settings}


class _TimeIsUpError(Exception):
    pass


@dataclass(frozen=True, slots=True)
class _Measured:
    placement: Placement
    settings: dict[str, Any]
    tokens_per_s: float
    used_bytes: dict[str, int]
    """By device."""
    prompt_tokens_per_s: float | None
    exchange_s: float
    """Of the exchange that is tuned for; without a GPU, of its reply alone."""


def tune(
    path: str | os.PathLike[str],
    *,
    n_ctx: int | None = None,
    memory: Mapping[str, int | str] | None = None,
    allow_kv_types: Sequence[CacheType] = (),
    rpc: Sequence[str] = (),
    prompt_tokens: int = PROMPT_TOKENS,
    reply_tokens: int = REPLY_TOKENS,
    seconds: float | None = None,
    report: Callable[[Trial], object] | None = None,
) -> Tuned:
    """Return the fastest settings around the plan, and keep them for ``Model(path, offload="tuned")``.

    These are tried in turn: threads, flash attention, batch size, types of the KV cache, placements, load mode,
    repacking and kernels. Each value is loaded, and stays if it is over 2 % faster than the best so far. Beside a GPU
    the time of an exchange counts, since a smaller batch makes room for weights there and makes prompts slower; without
    one, decoding alone. The batch from which on a GPU computes with weights in RAM is measured last, both ways.

    Parameters
    ----------
    path, n_ctx, memory, rpc
        As for :class:`overspill.Model`; ``n_ctx`` at least 64. Placement and settings are for this context.
    allow_kv_types
        Types of the KV cache to try besides ``"f16"``. They may change the model's answers.
    prompt_tokens, reply_tokens
        The exchange that counts beside a GPU, at least 1 token each; of the prompt, at most half of the context.
    seconds
        No trial begins after so many seconds, at least 0; the plan is measured in any case. Default: no limit.
    report
        Called with each :class:`Trial` when it begins, and again when it is done.

    Returns
    -------
    Tuned
        After Ctrl-C too, once the plan was measured: with the best so far.

    Raises
    ------
    Error, ValueError, TypeError
        As for :class:`overspill.Model`, if the plan itself cannot be loaded.
    """
    kinds = as_list("allow_kv_types", allow_kv_types, "types of the KV cache")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in CACHE_TYPES:
            known = ", ".join(CACHE_TYPES)
            raise ValueError(f"allow_kv_types: types of the KV cache must be of {known}, not {shown(kind)}")
    sizes = parse_memory(memory)
    if report is not None:
        as_function("report", report)
    if n_ctx is not None:
        n_ctx = as_integer("n_ctx", n_ctx, 64, 2**31 - 1)
    if seconds is not None and not (seconds := as_real("seconds", seconds)) >= 0:
        raise ValueError(f"seconds must be at least 0, not {seconds}")
    deadline = float("inf") if seconds is None else time.monotonic() + seconds
    info = ModelInfo.from_file(path)
    add_rpc_servers(rpc)
    exchange = (as_integer("prompt_tokens", prompt_tokens, 1, 2**31 - 1),
                as_integer("reply_tokens", reply_tokens, 1, 2**31 - 1))  # fmt: skip
    search = _Search(info, n_ctx, sizes, exchange, deadline, report or (lambda trial: None))
    stopped: Literal["", "interrupted", "out of time"] = ""
    try:
        search.run(kinds)
    except _TimeIsUpError:
        stopped = "out of time"
    except KeyboardInterrupt:
        if search.planned is None:
            raise
        stopped = "interrupted"
    return Tuned(
        tuple(search.trials),
        search.best.placement,
        search.best.settings,
        search.best.tokens_per_s,
        search.planned.tokens_per_s if search.planned else 0.0,
        search.best.prompt_tokens_per_s,
        search.planned.prompt_tokens_per_s if search.planned else None,
        stopped,
        _keep(search, complete=not stopped),
    )


def _keep(search: _Search, *, complete: bool) -> Path | None:
    best = search.best
    if not complete and tuned_speed(search.info) > best.tokens_per_s:
        return None
    try:
        return save_tuned(search.info, best.placement, best.settings, best.tokens_per_s)
    except OSError as error:
        logger.warning("what was tuned could not be kept: %s", error)
        return None


def _load(info: ModelInfo, **options: Any) -> Model:
    # Python has a look at Ctrl-C each time that it is told of progress.
    model = Model(info, progress=lambda share: None, **options)
    model._remembers_experts = False
    wait_for_pinning(model._core)
    return model


def _best_s(model: Model, n_before: int, n_tokens: int, *, at_once: bool, rounds: int = _ROUNDS) -> float:
    """Return the seconds of the best of a few rounds of some tokens after others, without the choice of tokens."""
    # Random tokens, the same for each trial, which use different experts, as those of a reply do.
    draw = random.Random(0)
    tokens = [draw.randrange(model.n_vocab) for _ in range(n_before + n_tokens)]
    best_s = float("inf")
    for _ in range(rounds):
        model.reset()
        if n_before:
            model.eval(tokens[:n_before])
        start = time.perf_counter()
        for token in [tokens] if at_once else [[token] for token in tokens[n_before:]]:
            model.eval(token)
        best_s = min(best_s, time.perf_counter() - start)
    return best_s


@dataclass
class _Search:
    """Coordinate descent: the trials so far, and the best of them."""

    info: ModelInfo
    n_ctx: int | None
    memory: Mapping[str, int | str]
    exchange: tuple[int, int]
    """Tokens of the prompt and of the reply."""
    deadline: float
    report: Callable[[Trial], object]
    trials: list[Trial] = field(default_factory=list)
    planned: _Measured | None = None
    changed: _Measured | None = None

    def __post_init__(self) -> None:
        self.gpus = [device for device in devices() if device.is_gpu]
        # Without a GPU only the free RAM matters, which need not be measured.
        self.hardware = Hardware.here(self.info, memory=self.memory, measure=bool(self.gpus))
        self.tried: list[Placement] = []

    @property
    def best(self) -> _Measured:
        """The fastest so far; it is replaced as a whole, so that Ctrl-C finds nothing half done."""
        best = self.changed or self.planned
        assert best is not None
        return best

    def run(self, allow_kv_types: Sequence[str]) -> None:
        """Measure the plan, then each setting that may be faster."""
        self._begin()
        for n_threads in self._thread_counts():
            self._try("n_threads", n_threads)
        self._try("flash_attention", "off")
        n_ubatch = self.best.settings["n_ubatch"]
        for other in (2 * n_ubatch, n_ubatch // 2, n_ubatch // 4):
            self._try_planned(n_ubatch=other)
        for kind in allow_kv_types:
            self._try_kv_type(kind)
        self._try_placements()
        in_ram_bytes = self.best.placement.bytes_by_device().get(self.hardware.cpu.name, 0)
        if in_ram_bytes <= self.hardware.cpu.memory_bytes:
            # Both take RAM that is not the file's own pages.
            self._try("load_mode", "read")
            if cpu_kernels() != "llama.cpp" or any(device.backend != "RPC" for device in self.gpus):
                self._try("repack", "on")
        if cpu_kernels() != "llama.cpp":
            self._try("kernels", "llama.cpp")
        self._try_least_batch()

    def _measured(self, model: Model, placement: Placement, settings: dict[str, Any]) -> _Measured:
        """Return the speed of a loaded model, and the memory in use."""
        rate = _TOKENS / _best_s(model, _PROMPT_TOKENS, _TOKENS, at_once=False)
        prompt_tokens, reply_tokens = self.exchange
        prompt_rate, exchange_s = None, reply_tokens / rate
        if self.gpus:
            n_tokens = min(prompt_tokens, model.n_ctx // 2)
            # The first batch of a size makes the graph, and wakes what sleeps.
            seconds = _best_s(model, 0, n_tokens, at_once=True)
            prompt_rate, exchange_s = n_tokens / seconds, exchange_s + seconds
        used_bytes = {name: use.total_bytes for name, use in model.memory.items()}
        return _Measured(placement, settings, rate, used_bytes, prompt_rate, exchange_s)

    def _try_least_batch(self) -> None:
        """Find the batch from which on it is faster if a GPU computes with weights in RAM: measure both ways."""
        best = self.best
        used = [gpu for gpu in self.hardware.gpus if gpu.name in best.placement.devices_used]
        names = {name for name, device in best.placement.tensors().items() if device == self.hardware.cpu.name}
        in_ram = [name for name in names if part_of(name) != "embedding"]  # of which batches look up rows
        if not in_ram or not any(gpu.copies_host_weights for gpu in used):
            return
        if time.monotonic() >= self.deadline:
            raise _TimeIsUpError
        trial = Trial("offload_min_batch", "", "measuring")
        self.report(trial)
        largest = min(best.settings["n_ubatch"], best.settings["n_ctx"] // 2)
        sizes = [*(n for n in _LEAST_BATCHES if n < largest), largest]
        times: list[list[float]] = []
        try:
            for least in (2, NEVER_TAKEN_OVER):
                settings = {**best.settings, "offload_min_batch": least}
                with _load(self.info, offload=best.placement, **settings) as model:
                    times.append([_best_s(model, 0, n, at_once=True) for n in sizes])
        except (Error, ValueError) as error:
            self._done(replace(trial, state="failed", problem=str(error)))
            return
        # The smallest from which on the GPU is always faster: a short batch may win by chance.
        least = NEVER_TAKEN_OVER
        for n, on_gpu, on_cpu in reversed(list(zip(sizes, *times, strict=True))):
            if on_gpu * (1 + _NOISE) >= on_cpu:
                break
            least = n
        self.changed = replace(best, settings={**best.settings, "offload_min_batch": least})
        self._done(replace(trial, value=str(least), state="kept"))

    def _begin(self) -> None:
        settings: dict[str, Any] = {
            "n_ctx": self.n_ctx,
            "n_ubatch": None,
            "n_threads": physical_cores(),
            "type_k": "f16",
            "type_v": "f16",
            "flash_attention": "auto",
            "repack": "auto",
            "kernels": "auto",
            "load_mode": "mmap",
            "offload_min_batch": None,
        }
        trial = Trial("plan", f"{settings['n_threads']} threads", "measuring")
        self.report(trial)
        exchange = dict(zip(("prompt_tokens", "reply_tokens"), self.exchange, strict=True))
        with _load(self.info, offload="auto", memory=self.memory, **settings, **exchange) as model:
            # Read back, since a GPU may have refused what was planned.
            used = model._settings
            settings |= {"n_ctx": model.n_ctx, "n_ubatch": used.n_ubatch}
            settings["offload_min_batch"] = used.offload_min_batch or None
            self.planned = self._measured(model, model.placement, settings)
        self._done(self._outcome(trial, self.planned, kept=True))

    @staticmethod
    def _outcome(trial: Trial, measured: _Measured, *, kept: bool) -> Trial:
        rates: dict[str, Any] = {"tokens_per_s": measured.tokens_per_s}
        rates["prompt_tokens_per_s"] = measured.prompt_tokens_per_s
        return replace(trial, state="kept" if kept else "not faster", **rates)

    def _done(self, trial: Trial) -> None:
        self.trials.append(trial)
        self.report(trial)

    def _try(self, setting: str, value: object, placement: Placement | None = None, **changed: Any) -> bool:
        """Measure one change to the best so far; return whether it is faster, and so is kept."""
        if time.monotonic() >= self.deadline:
            raise _TimeIsUpError
        if not changed and setting in SETTINGS:
            changed = {setting: value}
        best = self.best
        settings = {**best.settings, **changed}
        if placement is None and settings == best.settings:
            return False
        # A plain placement is taken as it is; a plan would be fitted again at loading.
        placement = best.placement if placement is None else Placement.copy(placement)
        trial = Trial(setting, str(value), "measuring")
        self.report(trial)
        try:
            with _load(self.info, offload=placement, **settings) as model:
                measured = self._measured(model, placement, settings)
        except (Error, ValueError) as error:
            self._done(replace(trial, state="failed", problem=str(error)))
            return False
        kept = measured.exchange_s * (1 + _NOISE) < best.exchange_s
        if kept:
            self.changed = measured
        self._done(self._outcome(trial, measured, kept=kept))
        return kept

    def _thread_counts(self) -> Iterator[int]:
        cores = physical_cores()
        logical = logical_cpus()
        counts = (cores - 1, cores * 3 // 4, cores // 2, min(logical, cores + cores // 2), logical)
        yield from dict.fromkeys(n for n in counts if n > 0 and n != cores)

    def _try_planned(self, **changed: Any) -> None:
        """Try a setting that changes the room on the GPUs, with the plan for it."""
        if self.gpus:
            ((name, value),) = changed.items()
            self._try(name, value, self._plan(**changed), **changed)

    def _try_kv_type(self, kind: str) -> None:
        changed = {"type_k": kind, "type_v": kind}
        placement = self._plan(**changed) if self.gpus else None
        # Quantized values are for flash attention alone.
        self._try("type_k, type_v", kind, placement, **changed, flash_attention="auto")

    def _plan(self, **changed: Any) -> Plan:
        names = ("n_ctx", "n_ubatch", "type_k", "type_v", "load_mode", "offload_min_batch")
        options: dict[str, Any] = {"hardware": self.hardware, "margin_bytes": _MARGIN_BYTES}
        options |= dict(zip(("prompt_tokens", "reply_tokens"), self.exchange, strict=True))
        return plan(self.info, **{**options, **{name: self.best.settings[name] for name in names}, **changed})

    def _with_room(self, name: str, room_bytes: int) -> Placement:
        """Return a plan with so many bytes on one GPU, whatever margin that leaves."""
        specs = tuple(
            replace(spec, memory_bytes=room_bytes)
            if spec.name == name
            else replace(spec, memory_bytes=max(0, spec.memory_bytes - _MARGIN_BYTES * (spec.kind == "gpu")))
            for spec in self.hardware.devices
        )
        return self._plan(hardware=replace(self.hardware, devices=specs), margin_bytes=0)

    def _try_placements(self) -> None:
        if not self.gpus:
            return
        self.tried = [self.best.placement]
        used = [spec for spec in self.hardware.gpus if spec.name in self.best.placement.devices_used]
        for spec in used:
            if not self._try_rooms(spec.name, spec.memory_bytes, +1):
                self._try_rooms(spec.name, spec.memory_bytes, -1)
        if used and self.info.file_bytes <= self.hardware.cpu.memory_bytes:
            self._try_placement("all on the CPU", Placement.cpu(self.info))
        if not used:
            pinned = self._plan(pins={"attention": "gpu", "kv": "gpu"})
            if pinned.forecast().verdict != "does not fit":
                self._try_placement("attention on a GPU", pinned)

    def _try_rooms(self, name: str, memory_bytes: int, direction: Literal[1, -1]) -> bool:
        """Try experts (or feed-forward matrices) of more or fewer layers on a GPU, for as long as that is faster."""
        part: Literal["experts", "dense"] = "experts" if self.info.n_experts else "dense"
        layer_bytes = max((layer.get(part, 0) for layer in self.info.layers), default=0)
        used_bytes, any_kept = self.best.used_bytes.get(name, 0), False
        for n_layers in (1, 2, 4):
            room_bytes = used_bytes + direction * n_layers * layer_bytes
            if not 0 < room_bytes <= memory_bytes - _SMALLEST_MARGIN_BYTES:
                break
            placement = self._with_room(name, room_bytes)
            if placement in self.tried:
                continue
            what = f"{part} of {format_count(n_layers, 'layer')}"
            kept = self._try_placement(f"{what} {'more' if direction > 0 else 'fewer'} on {name}", placement)
            any_kept = any_kept or kept
            if not kept:
                break
        return any_kept

    def _try_placement(self, value: str, placement: Placement) -> bool:
        if placement in self.tried:
            return False
        self.tried.append(placement)
        return self._try("placement", value, placement)
