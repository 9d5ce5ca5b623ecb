"""How fast any placement decodes on any hardware, what memory it takes, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from overspill.base.cached import cached_property
from overspill.base.checks import as_flag, as_instance, as_integer
from overspill.base.text import short_repr
from overspill.base.values import LoadMode
from overspill.header.info import ModelInfo
from overspill.machine.hardware import Hardware
from overspill.placement.placement import Placement
from overspill.planning.advice import experts_on_gpus, reason_for, remedies_for, weights_in_ram
from overspill.planning.prompt import Prompts
from overspill.planning.residency import (
    INSERTIONS_PER_MISS,
    CachedLayer,
    ExpertForecast,
    cached_layers,
    expected_hit_share,
    experts_bytes,
    layer_s,
)
from overspill.planning.settings import (
    DEFAULT_UBATCH,
    PROMPT_TOKENS,
    REPLY_TOKENS,
    Settings,
    checked_settings,
    prompt_length,
)
from overspill.planning.verdict import MemoryForecast, Verdict, memory_by_device, verdict_of
from overspill.planning.workload import Arrangement, Workload

__all__ = ["Estimate", "Forecast", "device_number", "forecast"]


@dataclass(frozen=True)
class Forecast:
    """The speed and the memory that are expected of a placement."""

    tokens_per_s: float
    """Decoding, with ``settings.depth`` tokens in the context."""
    seconds_by_term: dict[str, dict[str, float]]
    """Seconds of one token by device and by what they are spent on: ``attention``, ``dense``, ``experts``, ``kv``,
    ``output``, ``operations`` (a fixed cost of each), ``hops`` (of the changes to this device), ``page faults``,
    ``cached experts`` (which the CPU waits for when it is done with its own), ``copied experts`` (into the cache)."""
    n_splits: int
    """Pieces of the graph, as llama.cpp's log counts them."""
    prompt_tokens_per_s: float
    """Reading a prompt of ``settings.prompt_tokens``."""
    time_to_first_token_s: float
    """Of such a prompt."""
    prompt_seconds_by_term: dict[str, dict[str, float]]
    """Seconds of the prompt by device and by what they are spent on: ``copies`` of weights from RAM over the link,
    ``arithmetic`` with weights, ``attention``, ``operations``, ``hops``, ``page faults``."""
    uninterrupted_s: float
    """The longest time within a prompt for which a GPU works without a look at whether to go on."""
    weights_in_ram: str
    """How weights in RAM are held for the GPU that copies them, and why, in a sentence; empty if none does."""
    memory: dict[str, MemoryForecast]
    """By device."""
    verdict: Verdict
    reason: str
    """In a sentence or two."""
    remedies: list[str]
    """Changes that would make more of the model fit, a phrase for each."""
    settings: Settings
    experts: ExpertForecast | None = None
    """What is expected of the cache of experts, if the placement has one."""

    @property
    def exchange_s(self) -> float:
        """Seconds of a prompt of ``settings.prompt_tokens`` and a reply of ``settings.reply_tokens``."""
        return self.time_to_first_token_s + self.settings.reply_tokens / self.tokens_per_s

    def __repr__(self) -> str:
        """Return the verdict and the speeds in brackets."""
        first = f"{self.time_to_first_token_s:.2g} s to the first token after {prompt_length(self.settings)}"
        return short_repr(self, f"{self.verdict}: {self.tokens_per_s:.1f} tokens/s, {first}")

    def to_dict(self) -> dict[str, Any]:
        """Return the forecast as JSON can hold it."""
        return {
            "tokens_per_s": self.tokens_per_s,
            "seconds_by_term": self.seconds_by_term,
            "n_splits": self.n_splits,
            "prompt_tokens_per_s": self.prompt_tokens_per_s,
            "time_to_first_token_s": self.time_to_first_token_s,
            "prompt_seconds_by_term": self.prompt_seconds_by_term,
            "uninterrupted_s": self.uninterrupted_s,
            "weights_in_ram": self.weights_in_ram,
            "memory": {
                name: {
                    "weights_bytes": use.weights_bytes,
                    "kv_bytes": use.kv_bytes,
                    "compute_bytes": use.compute_bytes,
                    "free_bytes": use.free_bytes,
                    "margin_bytes": use.margin_bytes,
                }
                for name, use in self.memory.items()
            },
            "verdict": self.verdict,
            "reason": self.reason,
            "remedies": self.remedies,
            "experts": None if self.experts is None else asdict(self.experts),
            "settings": {name: getattr(self.settings, name) for name in Settings.__slots__},
        }


def device_number(hardware: Hardware, device: str) -> int:
    """Return the number of a device, given its name as :meth:`Hardware.device` takes it."""
    return hardware.devices.index(hardware.device(device))


@dataclass(frozen=True)
class Estimate:
    """A placement in the numbers of a workload, and the forecast for it, which is made once."""

    work: Workload
    arranged: Arrangement
    pools: Mapping[int, int] = field(default_factory=dict)
    """Bytes for a cache of experts, by the number of the GPU."""
    hit_share: float | None = None
    """Of that cache; None: as is to be expected of its size."""
    insertions: float | None = None
    """Experts that are copied there for a token; None: as is to be expected of the misses."""

    @classmethod
    def of(cls, info: ModelInfo, placement: Placement, hardware: Hardware, settings: Settings) -> Estimate:
        """Return the estimate for any placement; the workload's groups are as the placement divides the layers."""
        tensors = placement.tensors()
        numbers = {device: device_number(hardware, device) for device in dict.fromkeys(tensors.values())}
        pinned = {name: numbers[device] for name, device in tensors.items()}
        work = Workload(info, hardware, settings, pinned)
        groups = [tuple(device or 0 for _, device in kind.groups) for kind in work.kinds]
        kv = [device_number(hardware, device) for device in placement.kv]
        embedding = pinned.get("token_embd.weight", work.cpu)
        pools = {device_number(hardware, device): n_bytes for device, n_bytes in placement.expert_cache.items()}
        arranged = Arrangement(kv, groups, device_number(hardware, placement.output_matrix), embedding)
        return cls(work, arranged, pools)

    @cached_property
    def experts(self) -> tuple[ExpertForecast, list[CachedLayer]] | None:
        """What is expected of the cache, and the layers that it is for; None without one."""
        layers = cached_layers(self.work, self.arranged, self.pools) if self.pools else []
        if not layers:
            return None
        cache_bytes = sum(self.pools.values())
        resident = min(1.0, cache_bytes / sum(layer.experts_bytes for layer in layers))
        share, assumption = self.hit_share, "as given"
        if share is None:
            share, assumption = expected_hit_share(resident), "as an LRU for each layer has in replays of gpt-oss-20b"
        insertions = self.insertions
        if insertions is None:
            insertions = INSERTIONS_PER_MISS * (1 - share) * sum(layer.n_used for layer in layers)
        return ExpertForecast(cache_bytes, resident, share, insertions, assumption), layers

    @cached_property
    def cache_terms(self) -> dict[tuple[str, str], float]:
        """What the cache changes of the seconds of a token, by device and part."""
        if self.experts is None:
            return {}
        outlook, layers = self.experts
        cpu = self.work.devices[self.work.cpu]
        changes: defaultdict[tuple[str, str], float] = defaultdict(float)
        # What is copied is read from the same RAM.
        n_bytes = outlook.insertions_per_token * sum(layer.expert_bytes for layer in layers) / len(layers)
        changes[cpu.name, "copied experts"] = n_bytes / cpu.bandwidth_bytes_per_s
        for layer in layers:
            reading_s, waiting_s = layer_s(layer, outlook.hit_share)
            changes[cpu.name, "experts"] += reading_s - layer.cpu_s
            changes[self.work.devices[layer.gpu].name, "cached experts"] += waiting_s
        return changes

    @property
    def cache_s(self) -> float:
        """What the cache changes of the seconds of a token."""
        return sum(self.cache_terms.values())

    def room_for_experts(self) -> dict[int, int]:
        """Return the bytes that everything else leaves for a cache of experts, by the number of the GPU."""
        work = self.work
        use, compute = work.evaluate(self.arranged), work.compute_bytes(self.arranged)
        missing, pools = experts_bytes(work.info), dict[int, int]()
        for gpu, spec in enumerate(work.devices[: work.cpu]):
            taken = use.weights_bytes[gpu] + use.kv_bytes[gpu] + compute[gpu] + work.settings.margin_bytes
            room = min(spec.memory_bytes - taken, missing)
            if spec.copies_host_weights and room > 0:
                pools[gpu] = room
                missing -= room
        return pools

    @cached_property
    def forecast(self) -> Forecast:
        """The forecast for the placement."""
        work, arranged = self.work, self.arranged
        use = work.evaluate(arranged)
        prompt = Prompts(work).use(arranged, use)
        by_term: dict[str, dict[str, float]] = {}
        for (device, part), seconds in prompt.terms.items():
            by_term.setdefault(work.devices[device].name, {})[part] = seconds
        terms, cache = work.terms(arranged), None if self.experts is None else self.experts[0]
        for (name, part), change_s in self.cache_terms.items():
            of_device = terms.setdefault(name, {})
            of_device[part] = of_device.get(part, 0.0) + change_s
        seconds = use.seconds + self.cache_s
        compute = work.compute_bytes(arranged)
        memory = memory_by_device(work, use, compute, self.pools)
        verdict = verdict_of(work, arranged, memory)
        # What is in the cache is in RAM as well, and gives way.
        needed = memory if verdict == "does not fit" else memory_by_device(work, use, compute, {})
        return Forecast(
            1 / seconds if seconds else float("inf"),
            terms,
            use.n_splits,
            prompt_length(work.settings) / prompt.seconds if prompt.seconds else float("inf"),
            prompt.seconds,
            by_term,
            prompt.longest_piece_s,
            weights_in_ram(work, arranged, use),
            memory,
            verdict,
            " ".join(filter(None, (reason_for(work, arranged, terms, needed, verdict), experts_on_gpus(cache)))),
            remedies_for(work, arranged, needed, verdict),
            work.settings,
            cache,
        )


def forecast(
    info: ModelInfo,
    placement: Placement,
    hardware: Hardware,
    *,
    n_ctx: int | None = None,
    n_parallel: int | None = None,
    depth: int | None = None,
    n_ubatch: int = DEFAULT_UBATCH,
    type_k: str = "f16",
    type_v: str = "f16",
    margin_bytes: int = 1 << 30,
    load_mode: LoadMode = "mmap",
    prompt_tokens: int = PROMPT_TOKENS,
    reply_tokens: int = REPLY_TOKENS,
    pin_weights: bool = False,
    offload_min_batch: int | None = None,
) -> Forecast:
    """Return how fast a placement decodes on some hardware, what memory it takes, and whether it fits.

    Parameters
    ----------
    info, placement, hardware
        The model, the placement, and what it is to run on; the placement's devices must be among the hardware's.
    n_ctx
        Tokens of context. Default: what the model was trained for, at most 8192.
    n_parallel
        Streams, 1 to 256, which have a KV cache of ``n_ctx`` tokens each. Default: 1. Speeds are those of one.
    depth
        Tokens of context in use, 0 to ``n_ctx``. Default: half of it.
    n_ubatch
        Tokens of a prompt that are computed at once, 1 to 65536.
    type_k, type_v
        Types of the KV cache.
    margin_bytes
        What is to be left free on each GPU.
    load_mode
        As of :class:`overspill.Model`.
    prompt_tokens, reply_tokens
        Tokens of the prompt and of the reply of an exchange, at least 1; of a longer prompt than ``n_ctx`` so much
        counts.
    pin_weights
        Whether mapped weights in RAM are registered with the driver of the GPU that copies them.
    offload_min_batch
        From so many tokens on, 1 to 65536, a GPU computes with weights in RAM; 0: whenever that is faster. Default:
        32, as llama.cpp.

    Raises
    ------
    ValueError
        A device of the placement is not there, the placement is for another model, or a number is out of range.
    """
    as_instance("placement", placement, Placement).check(as_instance("info", info, ModelInfo))
    as_instance("hardware", hardware, Hardware)
    settings = checked_settings(
        info,
        n_ctx=n_ctx,
        n_parallel=n_parallel,
        depth=depth,
        n_ubatch=as_integer("n_ubatch", n_ubatch, 1, 65536),
        type_k=type_k,
        type_v=type_v,
        margin_bytes=margin_bytes,
        load_mode=load_mode,
        prompt_tokens=prompt_tokens,
        reply_tokens=reply_tokens,
        pin_weights=as_flag("pin_weights", pin_weights),
        offload_min_batch=offload_min_batch,
    )
    return Estimate.of(info, placement, hardware, settings).forecast
