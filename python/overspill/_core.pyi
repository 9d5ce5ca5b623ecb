"""The native core: what ``bindings.cpp`` exposes. Use the package's own names instead."""

from collections.abc import Callable, Sequence
from typing import Any, final

class Error(Exception):
    """Something that the library or llama.cpp could not do; the base of the others."""

class ModelLoadError(Error):
    """The file is missing, damaged, or not a model that can be loaded."""

class ContextFullError(Error):
    """Prompt and reply do not fit into the context (``n_ctx``)."""

class ClosedError(Error):
    """The model was closed."""

class CancelledError(Error):
    """The progress callback returned False."""

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
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Model:
    def __init__(
        self,
        path: str | bytes,
        *,
        cpu_only: bool,
        n_gpu_layers: int,
        n_ctx: int,
        n_batch: int,
        n_threads: int,
        load_mode: str,
        vocab_only: bool,
        check_tensors: bool,
        progress: Callable[[float], bool | None] | None,
    ) -> None: ...
    def open_stream(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repeat_penalty: float,
        frequency_penalty: float,
        presence_penalty: float,
        repeat_last_n: int,
        seed: int | None,
        stop: Sequence[str],
        logprobs: bool,
    ) -> Generation: ...
    def tokenize(self, text: bytes, add_special: bool, parse_special: bool) -> list[int]: ...
    def detokenize(self, tokens: Sequence[int], skip_special: bool) -> bytes: ...
    def token_bytes(self, token: int, special: bool) -> bytes: ...
    def special_tokens(self) -> dict[str, int]: ...
    def is_end_of_generation(self, token: int) -> bool: ...
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
    def stats(self) -> tuple[int, int, float, float, float | None, str | None]: ...

def read_gguf(path: str | bytes) -> dict[str, Any]: ...
def file_type_name(file_type: int) -> str: ...
def devices() -> list[dict[str, Any]]: ...
def add_rpc_server(endpoint: str) -> None: ...
def load_backends(folder: str) -> None: ...
