"""The native core: what ``bindings.cpp`` exposes. Use the package's own names instead."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, final

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

class CancelledError(Error):
    """The progress callback returned False."""

_Breakdown: TypeAlias = tuple[float, float, float, float, float, float, float, float, int, int, int]
_Stats: TypeAlias = tuple[int, int, float, float, float | None, str | None, int, int, _Breakdown]

LLAMA_CPP_COMMIT: str
GPU_BACKENDS: list[str]
RPC_PROTOCOL_VERSION: tuple[int, int]

@final
class Token:
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

@final
class Model:
    def __init__(
        self, path: bytes, options: dict[str, Any], progress: Callable[[float], bool | None] | None
    ) -> None: ...
    def memory(self) -> dict[str, Any]: ...
    def open_stream(
        self,
        prompt: Sequence[int],
        *,
        sampler: Sampler,
        max_tokens: int,
        stop: Sequence[str],
        logprobs: int,
        grammar: str | None,
        mask: object | None,
        choose: Callable[[NDArray[np.float32], NDArray[np.int32]], int | None] | None,
        logits: bool,
        look_ahead: bool,
        reuse: bool,
        named: Sequence[int],
        droppable: Sequence[tuple[int, int]],
        trigger_patterns: Sequence[str],
        trigger_tokens: Sequence[int],
        begun: Sequence[int],
    ) -> Generation: ...
    def open_batch(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samplers: Sequence[Sampler],
        max_tokens: int,
        stop: Sequence[str],
        logprobs: int,
        grammar: str | None,
        parallel: int,
        n_ctx: int,
    ) -> BatchGeneration: ...
    @property
    def has_chat_template(self) -> bool: ...
    def chat_template(self, source: str) -> ChatTemplate: ...
    def dry_breakers(self, texts: Sequence[str]) -> list[list[int]]: ...
    def tokenize(self, text: bytes, add_special: bool, parse_special: bool) -> list[int]: ...
    def detokenize(self, tokens: Sequence[int], skip_special: bool) -> bytes: ...
    def token_bytes(self, token: int, special: bool) -> bytes: ...
    def special_tokens(self) -> dict[str, int]: ...
    def metadata(self, key: str) -> str: ...
    def is_end_of_generation(self, token: int) -> bool: ...
    def time_devices(self, tokens: Sequence[int], n: int) -> dict[str, Any]: ...
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...
    @property
    def n_vocab(self) -> int: ...
    @property
    def n_ctx(self) -> int: ...
    @property
    def n_ctx_train(self) -> int: ...
    @property
    def n_threads(self) -> int: ...

@final
class Generation:
    def __iter__(self) -> Generation: ...
    def __next__(self) -> Token: ...
    def close(self, reason: str) -> None: ...
    def stats(self) -> _Stats: ...

@final
class BatchGeneration:
    def __iter__(self) -> BatchGeneration: ...
    def __next__(
        self,
    ) -> tuple[int, list[Token], _Stats]: ...
    def close(self) -> None: ...

@final
class ChatTemplate:
    def render(
        self,
        messages: str,
        *,
        tools: str,
        tool_choice: str,
        json_schema: str,
        enable_thinking: bool,
        add_generation_prompt: bool,
        variables: dict[str, str],
    ) -> dict[str, Any]: ...
    @property
    def source(self) -> str: ...

@final
class ReplyParser:
    def parse(self, text: str, is_partial: bool) -> tuple[str, str, list[tuple[str, str, str]]]: ...

@final
class Sampler:
    def __init__(self, options: dict[str, Any]) -> None: ...
    def sample(self, logits: NDArray[np.float32], allowed: object | None) -> int: ...
    def distribution(
        self, logits: NDArray[np.float32], allowed: object | None
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]: ...
    def accept(self, token: int) -> None: ...
    def reset(self) -> None: ...
    def clone(self) -> Sampler: ...
    def state(self) -> tuple[int, int, list[int], float]: ...
    def restore(self, seed: int, n_draws: int, history: Sequence[int], mirostat_mu: float) -> None: ...

@final
class Evaluation:
    def __init__(self, model: Model) -> None: ...
    def eval(self, tokens: Sequence[int], every: bool) -> NDArray[np.float32]: ...
    def reset(self) -> None: ...

@final
class DeviceMeter:
    def __init__(
        self,
        device: str,
        *,
        n_threads: int,
        working_set_bytes: int,
        gpus: Sequence[str],
        host_buffers: bool,
        budget_s: float,
    ) -> None: ...
    def weight_rate(
        self,
        type: str,  # noqa: A002
        n_in: int,
        n_out: int,
        n_experts: int,
        n_used: int,
    ) -> tuple[float, str]: ...
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
    def memory_bytes_per_s(self) -> float: ...
    def link_bytes_per_s(self, n_bytes: int) -> float: ...

def default_sampling() -> dict[str, float]: ...
def check_sampling(options: dict[str, Any]) -> None: ...
def simd() -> str: ...
def grammar_of_json_schema(schema: str) -> str: ...
def read_gguf(path: str | bytes) -> dict[str, Any]: ...
def file_type_name(file_type: int) -> str: ...
def cpu_features() -> list[str]: ...
def devices() -> list[dict[str, Any]]: ...
def add_rpc_server(endpoint: str) -> None: ...
def load_backends(folder: str) -> None: ...
