"""The native core: what ``cpp/bindings/`` exposes. Use the package's own names instead."""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Literal, Never, final

import numpy as np
from numpy.typing import NDArray

class Error(Exception):
    """Something that the library or llama.cpp could not do; the base of the others."""

class ModelLoadError(Error):
    """The file is missing, damaged, or not a model that can be loaded."""

class OutOfMemoryError(Error):
    """A device refused memory that a model or its context needs."""

    device: str
    needed_bytes: int

class ContextFullError(Error):
    """Prompt and reply do not fit into the context (``n_ctx``)."""

class ClosedError(Error):
    """The model was closed."""

class UnusableError(Error):
    """An assertion of llama.cpp failed while the model computed: it cannot be used any more; load it anew."""

class CancelledError(Error):
    """The progress callback returned False."""

class _Type(type):
    """pybind11's metaclass."""

class _Native(metaclass=_Type):
    """A class of the core's. Where no constructor is given, only the core makes these: calling it is a TypeError."""

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...

@final
class Origin(_Native):
    """The process in which it was made."""

    def __init__(self) -> None: ...
    @property
    def is_here(self) -> bool:
        """Whether the process was not forked since."""

    def check(self, what: str) -> None:
        """Raise an Error in a process that was forked since; ``what`` begins its text."""

class _NativeEnum:
    __pybind11_native_enum__: object

LLAMA_CPP_COMMIT: str
GPU_BACKENDS: list[str]
RPC_PROTOCOL_VERSION: tuple[int, int]
UNKNOWN_EXPERT: int

@final
class Token(_Native):
    """One token of a reply; ``str()`` gives its text."""

    @property
    def id(self) -> int:
        """Its number in the vocabulary."""
    @property
    def text(self) -> str:
        """The text that it completes, in whole characters.

        Empty if a character or a possible stop string is not complete yet, and for special tokens.
        """
    @property
    def logprob(self) -> float | None:
        """Natural logarithm of its probability before temperature and truncation; None unless asked for."""
    @property
    def top_logprobs(self) -> tuple[tuple[int, float], ...]:
        """The most likely tokens and the logarithms of their probabilities, best first; empty unless asked for."""
    @property
    def logits(self) -> NDArray[np.float32]:
        """The logits that it was chosen from, float32 of shape (n_vocab,).

        A view on llama.cpp's own memory, which the stream's next token overwrites. ``Error`` unless
        ``stream(logits=True)`` was said, or after the next token.
        """
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

class StopReason(_NativeEnum, Enum):
    """Why a reply ended."""

    eos = 1
    stop_string = 2
    max_tokens = 3
    context_full = 4
    closed = 5
    interrupted = 6
    error = 7

@final
class Breakdown(_Native):
    """Where the time of tokens went: seconds of all of them together, and what was seen on the way."""

    @property
    def wait_s(self) -> float: ...
    @property
    def decode_s(self) -> float: ...
    @property
    def sync_s(self) -> float: ...
    @property
    def logits_s(self) -> float: ...
    @property
    def sample_s(self) -> float: ...
    @property
    def python_s(self) -> float: ...
    @property
    def text_s(self) -> float: ...
    @property
    def caller_s(self) -> float: ...
    @property
    def n_graphs_reused(self) -> int: ...
    @property
    def n_threads_left_out(self) -> int: ...
    @property
    def n_major_page_faults(self) -> int:
        """-1 where they are not known."""
    @property
    def n_graph_splits(self) -> int: ...

@final
class GenerationStats(_Native):
    """What a reply took so far."""

    @property
    def n_prompt_tokens(self) -> int: ...
    @property
    def n_cached_tokens(self) -> int: ...
    @property
    def n_dropped_tokens(self) -> int: ...
    @property
    def n_tokens(self) -> int: ...
    @property
    def prefill_s(self) -> float: ...
    @property
    def decode_s(self) -> float: ...
    @property
    def time_to_first_token_s(self) -> float | None: ...
    @property
    def stop_reason(self) -> StopReason | None: ...
    @property
    def breakdown(self) -> Breakdown: ...

class Switch(_NativeEnum, Enum):
    """Whether something is done; ``auto`` leaves it to llama.cpp."""

    auto = 0
    on = 1
    off = 2

class CpuKernels(_NativeEnum, Enum):
    """What multiplies weights in RAM."""

    auto = 0
    llama_cpp = 1

class LoadMode(_NativeEnum, Enum):
    """How weights get into memory."""

    mmap = 0
    read = 1
    mlock = 2
    mmap_mlock = 3
    direct_io = 4

class CacheType(_NativeEnum, Enum):
    """What a KV cache is stored as."""

    f32 = 0
    f16 = 1
    bf16 = 2
    q8_0 = 3
    q5_1 = 4
    q5_0 = 5
    q4_1 = 6
    q4_0 = 7
    iq4_nl = 8

@final
class Placement(_Native):
    """Where tensors go, in llama.cpp's terms; nothing of it set: everything on the CPU."""

    devices: list[str]
    tensor_split: Sequence[float]
    n_gpu_layers: int
    overrides: list[tuple[str, str]]
    def __init__(self) -> None: ...

@final
class ModelOptions(_Native):
    """How a model is to be loaded."""

    placement: Placement
    n_ctx: int
    n_batch: int
    n_ubatch: int
    n_threads: int
    adapt_threads: bool
    n_parallel: int
    prompt_cache_bytes: int
    max_pause_s: float
    type_k: CacheType
    type_v: CacheType
    flash_attention: Switch
    load_mode: LoadMode
    repack: Switch
    kernels: CpuKernels
    offload_min_batch: int
    pin_weights: bool
    share_of_reading: float
    experts: ExpertCacheOptions
    metadata: list[tuple[str, bool | int | float | str]]
    vocab_only: bool
    check_tensors: bool
    dry_run: bool
    def __init__(self) -> None: ...

@final
class MemoryUse(_Native):
    """What a model takes of a device."""

    @property
    def weights_bytes(self) -> int: ...
    @property
    def kv_bytes(self) -> int: ...
    @property
    def compute_bytes(self) -> int: ...

@final
class PlacedTensor(_Native):
    """A tensor of a loaded model, and where it is."""

    @property
    def name(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def buffer_type(self) -> str: ...
    @property
    def n_bytes(self) -> int: ...

@final
class PlacedCache(_Native):
    """The KV cache of a layer, and where it is."""

    @property
    def layer(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def n_bytes(self) -> int: ...

@final
class MemoryReport(_Native):
    """What llama.cpp says of a model and one context of it."""

    @property
    def devices(self) -> dict[str, MemoryUse]: ...
    @property
    def tensors(self) -> list[PlacedTensor]: ...
    @property
    def kv(self) -> list[PlacedCache]: ...
    @property
    def n_splits(self) -> int: ...

@final
class PinnedMemory(_Native):
    """What of the weights in RAM is registered with a GPU's driver, so that copies of it are fast."""

    @property
    def registered_bytes(self) -> int: ...
    @property
    def wanted_bytes(self) -> int: ...
    @property
    def finished(self) -> bool: ...
    @property
    def reason(self) -> str:
        """Why less is registered than was wanted; empty if nothing was refused."""

@final
class SequenceState(_Native):
    """What a KV cache knows of a sequence of tokens."""

    def __init__(
        self,
        n_tokens: int,
        state_bytes: int,
        remembered_bytes: int,
        n_remembered: int,
        n_streams: int,
        is_long: bool,
    ) -> None: ...
    def parts(self) -> list[NDArray[Any]]:
        """Return views on its memory: tokens (int32), state and remembered state (uint8)."""
    @property
    def n_remembered(self) -> int: ...
    @property
    def n_streams(self) -> int: ...
    @property
    def is_long(self) -> bool: ...

@final
class GenerationOptions(_Native):
    """What a reply is to be like, and how it is come by."""

    sampler: Sampler
    max_tokens: int
    stop: list[str]
    n_logprobs: int
    grammar: str | None
    mask: object | None
    choose: Callable[[NDArray[np.float32], NDArray[np.int32]], int | None] | None
    keep_logits: bool
    look_ahead: bool
    reuse: bool
    saved: SequenceState | None
    keeps_state: bool
    eager: bool
    recorder: ExpertRecorder | None
    form: ReplyForm
    def __init__(self) -> None: ...

@final
class Model(_Native):
    def __init__(self, path: bytes, options: ModelOptions, progress: Callable[[float], bool | None] | None) -> None: ...
    def memory(self) -> MemoryReport: ...
    def pinned(self) -> PinnedMemory: ...
    def expert_counts(self) -> ExpertCounts | None: ...
    def expert_profile(self) -> dict[int, list[int]]: ...
    def shuffle_experts(self, seed: int) -> None:
        """Have other experts in the cache from the next token on, for tests."""
    def check_tokens(self, argument: str, tokens: Sequence[int]) -> None: ...
    def open_stream(self, prompt: Sequence[int], options: GenerationOptions) -> Generation: ...
    def save_state(self, tokens: Sequence[int]) -> SequenceState | None:
        """Return what has most in common with the tokens; of none, what was decoded last."""
    def restore_state(self, saved: SequenceState) -> None: ...
    def prompt_cache_bytes(self) -> int: ...
    @property
    def has_chat_template(self) -> bool: ...
    def chat_template_source(self, with_tools: bool) -> str: ...
    def dry_breakers(self, texts: Sequence[str]) -> list[list[int]]: ...
    def tokenize(self, text: bytes, add_special: bool, parse_special: bool) -> list[int]: ...
    def detokenize(self, tokens: Sequence[int], skip_special: bool) -> bytes: ...
    def token_bytes(self, token: int, special: bool) -> bytes: ...
    def special_tokens(self) -> dict[str, int]: ...
    def metadata(self, key: str) -> str: ...
    def control_tokens(self) -> list[tuple[str, bool, bool]]: ...
    def is_end_of_generation(self, token: int) -> bool: ...
    def time_devices(self, tokens: Sequence[int], n: int) -> DeviceTimes: ...
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...
    @property
    def n_vocab(self) -> int: ...
    @property
    def n_ctx(self) -> int: ...
    @property
    def n_threads(self) -> int: ...

@final
class Generation(_Native):
    def __iter__(self) -> Generation: ...
    def __next__(self) -> Token: ...
    def close(self, reason: StopReason) -> None: ...
    def take_state(self) -> SequenceState | None:
        """Return, once, what was kept at its end; None if nothing was."""
    def stats(self) -> GenerationStats: ...

class ToolChoice(_NativeEnum, Enum):
    """Whether a model may call tools."""

    auto = 0
    required = 1
    none = 2

@final
class ToolCall(_Native):
    """A call that a model asks for."""

    @property
    def name(self) -> str: ...
    @property
    def arguments(self) -> str: ...
    @property
    def id(self) -> str: ...

class ReplyPart(_NativeEnum, Enum):
    """What a piece of a reply belongs to."""

    reasoning = 0
    answer = 1
    call = 2

@final
class ReplyPiece(_Native):
    """The next piece of a reply."""

    @property
    def part(self) -> ReplyPart: ...
    @property
    def text(self) -> str: ...
    @property
    def call(self) -> ToolCall | None: ...

@final
class ReplyReader(_Native):
    """Divides one reply, as it comes, into reasoning, answer and calls."""

    def add(self, text: str) -> list[ReplyPiece]: ...
    def finish(self, is_whole: bool) -> list[ReplyPiece]: ...
    @property
    def is_malformed(self) -> bool: ...

@final
class ReplyForm(_Native):
    """How the reply to a conversation is to be made, and read."""

    droppable: list[tuple[int, int]]
    def __init__(self) -> None: ...
    @property
    def generation_prompt(self) -> str: ...
    @property
    def named(self) -> list[int]: ...
    def new_reader(self) -> ReplyReader: ...

@final
class ChatTemplate(_Native):
    def __init__(self, model: Model, source: str) -> None: ...
    def form(
        self,
        messages: str,
        *,
        tools: str,
        tool_choice: ToolChoice,
        tools_by_call: str,
        tools_by_parameter: str,
        has_schema: bool,
        rules: str,
        enable_thinking: bool,
        variables: dict[str, str],
    ) -> ReplyForm: ...
    def amended(self, with_tools: bool) -> str: ...

@final
class SamplingOptions(_Native):
    """What to make of a row of logits: the fields of ``overspill.SamplingOptions``, with tokens in place of texts."""

    def __init__(self, **options: Any) -> None: ...
    def __eq__(self, other: object, /) -> bool: ...

@final
class SamplerState(_Native):
    """All that makes a sampler draw differently from a new one with the same options."""

    def __init__(self, *, seed: int, n_draws: int, history: Sequence[int], mirostat_mu: float) -> None: ...
    @property
    def seed(self) -> int: ...
    @property
    def n_draws(self) -> int: ...
    @property
    def history(self) -> list[int]: ...
    @property
    def mirostat_mu(self) -> float: ...

@final
class Sampler(_Native):
    def __init__(self, options: SamplingOptions) -> None: ...
    def sample(self, logits: NDArray[np.float32], allowed: object | None) -> int: ...
    def distribution(
        self, logits: NDArray[np.float32], allowed: object | None
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]: ...
    def accept(self, token: int) -> None: ...
    def reset(self) -> None: ...
    def clone(self) -> Sampler: ...
    def state(self) -> SamplerState: ...
    def restore(self, state: SamplerState) -> None: ...

@final
class Evaluation(_Native):
    def __init__(self, model: Model) -> None: ...
    def eval(self, tokens: Sequence[int], every: bool) -> NDArray[np.float32]: ...
    def reset(self) -> None: ...

@final
class WeightRate(_Native):
    """How fast weights are read."""

    @property
    def bytes_per_s(self) -> float: ...
    @property
    def buffer_type(self) -> str: ...
    @property
    def kernels(self) -> str:
        """What multiplied: ``"llama.cpp"``, or the instruction set of our products."""

@final
class LinkRates(_Native):
    """How fast copies are."""

    @property
    def to_device_bytes_per_s(self) -> float: ...
    @property
    def from_device_bytes_per_s(self) -> float: ...

@final
class DeviceTime(_Native):
    """What a device does for a token."""

    @property
    def seconds(self) -> float: ...
    @property
    def n_pieces(self) -> int: ...

@final
class DeviceTimes(_Native):
    """Where the time of a token goes, on average."""

    @property
    def devices(self) -> dict[str, DeviceTime]: ...
    @property
    def moving_s(self) -> float: ...
    @property
    def total_s(self) -> float: ...

@final
class DeviceMeter(_Native):
    def __init__(
        self,
        device: str,
        *,
        n_threads: int,
        working_set_bytes: int,
        gpus: Sequence[str],
        budget_s: float,
    ) -> None:
        """``budget_s`` is for each measurement, after a first run; with 0 there is one run more."""
    def use_products(self, kernels: str, repack: bool | None) -> None:
        """Choose what the CPU multiplies with from now on, instead of what a model does by default.

        ``kernels`` is ``"auto"``, ``"llama.cpp"`` or an instruction set of ours. ``repack`` says whether weights are in
        llama.cpp's repacked layouts, where it has one; None: where they are by default.
        """
    def weight_rate(
        self,
        type: str,  # noqa: A002
        n_in: int,
        n_out: int,
        n_experts: int,
        n_used: int,
        n_tokens: int = 1,
    ) -> WeightRate:
        """Return how fast weights are read for ``n_tokens`` at once, which use the same experts."""
    def attention_bytes_per_s(
        self,
        type: str,  # noqa: A002
        n_heads: int,
        n_heads_kv: int,
        head_width: int,
        n_kv: int,
    ) -> float: ...
    def operation_s(self, n_embd: int) -> float: ...
    def visit_s(self, n_embd: int) -> float: ...
    def exchange_s(self, type_name: str, n_embd: int, n_ff: int, n_used: int) -> float: ...
    def memory_bytes_per_s(self) -> float: ...
    def link_rates(self, n_bytes: int, pinned: bool) -> LinkRates: ...
    def batch_flops(
        self,
        type: str,  # noqa: A002
        n_in: int,
        n_out: int,
        n_experts: int,
        n_used: int,
        n_tokens: int,
    ) -> float: ...
    def attention_flops(
        self,
        type: str,  # noqa: A002
        n_heads: int,
        n_heads_kv: int,
        head_width: int,
        n_tokens: int,
    ) -> float: ...

class CachePolicy(_NativeEnum, Enum):
    """Which experts leave a cache, and which are inserted."""

    lru = 0
    lru_one_insertion = 1
    lru_shared = 2
    second_touch = 3
    lfu = 4
    fixed = 5
    belady = 6

@final
class ReplayCounts(_Native):
    """Of each layer."""

    @property
    def n_requests(self) -> list[int]: ...
    @property
    def n_hits(self) -> list[int]: ...
    @property
    def n_insertions(self) -> list[int]: ...

@final
class GgufArray(_Native):
    """An array of a header."""

    @property
    def element_type(self) -> str: ...
    @property
    def length(self) -> int: ...
    @property
    def values(self) -> list[bool] | list[int] | list[float] | None:
        """None for text, and for more than 4096 elements."""

@final
class GgufTensor(_Native):
    @property
    def name(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def n_bytes(self) -> int: ...

@final
class GgufFile(_Native):
    """What a model's files say of it; each list is made when it is read."""

    @property
    def metadata(self) -> dict[str, bool | int | float | str | GgufArray]: ...
    @property
    def tensors(self) -> list[GgufTensor]: ...
    @property
    def files(self) -> list[str]: ...
    @property
    def n_bytes(self) -> int: ...

@final
class DeviceDescription(_Native):
    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def kind(self) -> Literal["cpu", "gpu", "integrated_gpu", "accelerator"]: ...
    @property
    def backend(self) -> str: ...
    @property
    def free_bytes(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def registers_host_memory(self) -> bool: ...

@final
class ExpertCacheOptions(_Native):
    """A cache of experts on GPUs."""

    pools: Sequence[tuple[str, int]]
    most_insertions: int
    profile: Any
    """Experts by layer: a mapping from numbers to sequences of numbers."""
    is_trusted: bool
    worth: float
    def __init__(self) -> None: ...

@final
class ExpertCounts(_Native):
    """What a cache of experts has answered since the model was loaded."""

    @property
    def n_tokens(self) -> int: ...
    @property
    def n_requests(self) -> int: ...
    @property
    def n_hits(self) -> int: ...
    @property
    def n_insertions(self) -> int: ...
    @property
    def hit_bytes(self) -> int: ...
    @property
    def miss_bytes(self) -> int: ...
    @property
    def n_resident(self) -> int: ...
    @property
    def n_slots(self) -> int: ...
    @property
    def n_experts(self) -> int: ...
    @property
    def is_off(self) -> bool: ...
    @property
    def is_proven(self) -> bool: ...

@final
class ExpertRecorder(_Native):
    """A ring of tokens, with the experts that each layer used."""

    def __init__(self, n_layers: int, n_used: int, n_tokens: int) -> None: ...
    def read(self) -> NDArray[np.uint16]:
        """Return all that was not read yet, of shape (tokens, n_layers, n_used)."""
    @property
    def n_lost(self) -> int:
        """Tokens that there was no room for."""

def replay_experts(ids: NDArray[np.uint16], n_experts: int, policy: CachePolicy, capacity: int) -> ReplayCounts: ...
def expert_reuse_distances(ids: NDArray[np.uint16], n_experts: int) -> list[int]: ...
def simd() -> str: ...
def read_gguf(path: str | bytes) -> GgufFile: ...
def file_type_name(file_type: int) -> str: ...
def cpu_features() -> list[str]: ...
def cpu_kernels() -> str: ...
def cpu_kernel_types() -> list[str]:
    """Return the types of weights that a model on the CPU alone multiplies with products of ours by default."""

def repacks(kernels: str) -> bool: ...
def devices() -> list[DeviceDescription]: ...
def add_rpc_server(endpoint: str) -> None: ...
def load_backends(folder: str) -> None: ...
