"""The class Model: load a model, then stream, chat, evaluate and tokenize."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Unpack

import numpy as np
from numpy.typing import NDArray

from overspill._core import (
    ClosedError,
    ContextFullError,
    Error,
    Evaluation,
    Generation,
    GenerationOptions,
    ReplyForm,
    SequenceState,
)
from overspill.base.cached import absent_on_error, cached_property
from overspill.base.checks import (
    as_flag,
    as_function,
    as_instance,
    as_integer,
    as_list,
    as_path,
    as_text,
    check_choice,
    check_keywords,
    keywords_of,
    naming,
    shown,
)
from overspill.base.text import short_repr
from overspill.base.units import Size, parse_memory
from overspill.base.values import (
    DEFAULT_CACHE_TYPE,
    DEFAULT_KERNELS,
    DEFAULT_LOAD_MODE,
    DEFAULT_SWITCH,
    CacheType,
    Completion,
    Experts,
    Kernels,
    LoadMode,
    LogitsProcessor,
    MemoryUse,
    Progress,
    Switch,
    Token,
    TokenChooser,
    TokenMask,
)
from overspill.engine.arguments import chooser, constraint, n_logprobs, n_tokens_at_most, stop_strings, token_ids
from overspill.engine.async_stream import AsyncChatStream, AsyncStream
from overspill.engine.keywords import CHAT_KEYWORDS, STREAM_KEYWORDS, ChatKeywords, ReplyKeywords, StreamKeywords
from overspill.engine.load_settings import checked_settings
from overspill.engine.loading import check_ram_for_caches, load, memory_by_device
from overspill.engine.reply import ChatReply, ChatStream
from overspill.engine.session import SavedStates, Session
from overspill.engine.stream import CachedExperts, FullContext, ReadBytes, Replies, Stream, TracedExperts, stats_of
from overspill.engine.template import ChatTemplate, Message, OnFull, ToolChoice, checked_messages
from overspill.engine.tools import Tool
from overspill.header.info import ModelInfo
from overspill.header.overrides import MetadataValue
from overspill.hub import resolve
from overspill.machine.devices import add_rpc_servers, check_names
from overspill.placement.placement import Placement
from overspill.planning.expert_profile import ExpertProfile, keep_expert_profile
from overspill.planning.offload import Offload, check_offload, tuned_beside
from overspill.planning.settings import PROMPT_TOKENS, REPLY_TOKENS
from overspill.sampling.options import SamplingKeywords, SamplingOptions, merge
from overspill.sampling.sampler import Sampler

__all__ = ["LOAD_KEYWORDS", "Model"]

_open_models: weakref.WeakSet[Model] = weakref.WeakSet()


@atexit.register
def _close_models() -> None:
    # A thread of a stream that looks ahead must not outlive the interpreter.
    for model in list(_open_models):
        model.close()


class Model:
    """A language model from a GGUF file, loaded and ready to stream.

    A model may be used from several threads. Streams that are open at the same time are decoded in one batch, which
    reads the weights once for all of them; where that does not pay, in smaller groups or in turns. Each has a KV cache
    of its own.

    Parameters
    ----------
    path
        The GGUF file; of a split model, its first file. ``hf:OWNER/REPOSITORY/FILE.gguf`` is downloaded
        from the Hugging Face hub (see :func:`overspill.hub.resolve`).
    offload
        What goes to the GPU:

        - ``"auto"``: the placement that :func:`overspill.plan` expects to be fastest; less if a GPU refuses memory;
        - ``"cpu"``: nothing; no GPU is touched;
        - ``"gpu"``: everything; an :class:`Error` without a GPU;
        - an integer from 0: so many layers, counted as llama.cpp's ``n_gpu_layers``: the output head, then the last
          layers;
        - ``"tuned"``: the placement that ``overspill tune`` found fastest for this model on this machine, and its
          settings where no others are given;
        - a :class:`Placement`, or a mapping such as ``{"default": "gpu", "experts": "cpu"}`` (see
          :meth:`Placement.apply`).
    rpc
        Endpoints, ``"host:port"``, of servers (``overspill serve-device``); their devices are added first, as by
        :func:`add_rpc_server`.
    n_ctx
        Tokens of prompt and reply together, at least 1. Default: the length that the model was trained for, at
        most 8192. The KV cache's memory grows with it.
    n_parallel
        Streams that are decoded together, 1 to 256; others wait for their place, in order. All have KV caches of
        ``n_ctx`` tokens from the beginning, which are part of the plan. A stream that ends leaves its tokens there, for
        prompts that begin with them, until the place is needed: the one used least recently goes first. Default: one
        cache, and more, for up to 16 streams, as streams are opened together and memory is free; they are freed when
        no stream is open.
    prompt_cache
        RAM for the tokens of streams that lose their place, in bytes or as in ``"2GiB"``. With it, what a prompt has in
        common with one that is no longer in a KV cache is copied back, where that is faster than reading it again.
        Those that were used least recently go first. It is for streams with ``reuse=True``, such as those of
        :meth:`chat`, and counts as memory of the model. Default: none.
    max_pause_s
        How long a prompt that is read may hold up the tokens of other streams, in seconds, 0.001 to 3600: it is read in
        pieces of about that length. A single token may take longer.
    n_batch
        Tokens of a prompt in one batch, 1 to 65536; other streams have their turn between batches. Default:
        ``n_ubatch``, and 512 if neither is given nor planned.
    n_ubatch
        Tokens of a batch that are computed at once, 1 to ``n_batch``. A GPU copies weights in RAM once for each of
        these, and compute buffers grow with it. Default: ``n_batch`` if that is given, otherwise what
        ``offload="auto"`` plans, otherwise 512.
    n_threads
        CPU threads, 1 to 512. Default: the physical cores, since decoding waits for memory.
    adapt_threads
        Whether fewer of them decode while other programs have their cores (on Linux and macOS): threads that wait for
        one that is not running are slower than fewer. Which number is faster is measured, again and again, until all
        are. Logits after 512 tokens or more may differ in their last bits with the number of threads.
    type_k, type_v
        The types of the KV cache's keys and values: ``"f32"``, ``"f16"``, ``"bf16"``, ``"q8_0"`` (half the memory
        of ``"f16"``), ``"q5_1"``, ``"q5_0"``, ``"q4_1"``, ``"q4_0"`` or ``"iq4_nl"``. Quantized values need flash
        attention.
    flash_attention
        ``"auto"`` (where every device can), ``"on"`` or ``"off"``.
    repack
        Whether weights on the CPU are copied into the order that suits its matrix products: faster, with other
        rounding, and with RAM for the copies beside a mapped file. ``"auto"``, ``"on"`` or ``"off"``. ``"auto"`` does
        not copy beside a CUDA GPU, which could not read the copies for large batches, nor where RAM has no room.
    kernels
        What multiplies weights in RAM: ``"auto"``, which is overspill's own kernels where they are faster, by the
        type of weights, the number of tokens and the CPU; or ``"llama.cpp"``. The environment variable
        ``OVERSPILL_KERNELS=llama.cpp`` has the same effect on all models.
    load_mode
        ``"mmap"`` maps the file, ``"read"`` reads it into memory (which lets a GPU pin it),
        ``"mlock"`` and ``"mmap+mlock"`` keep it from being swapped out, ``"direct-io"`` reads
        past the page cache.
    pin_weights
        Whether weights that stay in RAM, mapped, are registered with the driver of the GPU that computes large batches
        with them: it copies them several times as fast then, and RAM cannot take their pages back while the model is
        open. It is done in the background, and undone by :meth:`close`. ``"auto"`` (where the driver can, and an
        eighth of the free RAM is left), ``"on"`` or ``"off"``.
    offload_min_batch
        The number of tokens, 1 to 65536, from which on a GPU computes with weights in RAM, which it copies for that;
        smaller batches are left to the CPU. Default: where ``offload="auto"`` expects that to be faster, otherwise
        llama.cpp's 32.
    experts
        Where the experts of a mixture are, as far as ``offload`` leaves them in RAM: ``"static"``, there; ``"cached"``,
        there, and those that tokens used lately in a cache on the GPUs as well, which compute them while the CPU
        computes the others; or ``"auto"``, what ``offload="auto"`` expects to be faster (static with other placements),
        which is given up if decoding turns out to be faster without.
        A cache needs overspill's own kernels.
    expert_cache
        The memory that ``experts="cached"`` takes of each GPU for them, as in ``{"CUDA0": "12GiB"}``. Default: what
        is free beside the rest of the model, less 1 GiB.
    expert_insertions
        The most experts, 1 to 65536, that are copied into the cache after a token. Default: as many as take a small
        part of its time.
    prompt_tokens, reply_tokens
        The exchange, at least 1 token each, that ``offload="auto"`` makes as short as possible.
    memory
        The memory of each device that ``offload="auto"`` may use, as in ``{"CUDA0": "20GiB", "cpu": "100GiB"}``;
        ``"gpu"`` is the first GPU, if there is one. Default: the free memory.
    overrides
        Values of the header in place of the file's, such as ``{"llama.rope.freq_base": 1e6}``:
        ``Model(path, overrides=...)`` is ``Model(ModelInfo.from_file(path).with_overrides(...))``, and
        :meth:`ModelInfo.with_overrides` says which there are.
    vocab_only
        Load the vocabulary alone, to tokenize; such a model cannot stream.
    check_tensors
        Look for invalid values in the weights while loading; slower.
    progress
        A function that is called with the share that is loaded, 0.0 to 1.0, from this thread. If it returns
        ``False``, the load ends with :class:`CancelledError`; its exceptions reach the caller.

    Raises
    ------
    ModelLoadError
        The file is missing, is not a GGUF, is damaged, or has an unknown architecture.
    OutOfMemoryError
        A device has too little memory for its part of the model; for RAM, this is checked before any is used.
    Error
        llama.cpp failed otherwise, an RPC server was lost, or nothing is tuned for this model.
    ValueError, TypeError
        An argument is out of the range given above, or a placement is for another model or other devices.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        offload: Offload = "auto",
        rpc: Sequence[str] = (),
        n_ctx: int | None = None,
        n_parallel: int | None = None,
        prompt_cache: Size = 0,
        max_pause_s: float = 0.5,
        n_batch: int | None = None,
        n_ubatch: int | None = None,
        n_threads: int | None = None,
        adapt_threads: bool = True,
        type_k: CacheType = DEFAULT_CACHE_TYPE,
        type_v: CacheType = DEFAULT_CACHE_TYPE,
        flash_attention: Switch = DEFAULT_SWITCH,
        repack: Switch = DEFAULT_SWITCH,
        kernels: Kernels = DEFAULT_KERNELS,
        load_mode: LoadMode = DEFAULT_LOAD_MODE,
        pin_weights: Switch = DEFAULT_SWITCH,
        offload_min_batch: int | None = None,
        experts: Experts = "auto",
        expert_cache: Mapping[str, int | str] | None = None,
        expert_insertions: int | None = None,
        prompt_tokens: int = PROMPT_TOKENS,
        reply_tokens: int = REPLY_TOKENS,
        memory: Mapping[str, int | str] | None = None,
        overrides: Mapping[str, MetadataValue] | None = None,
        vocab_only: bool = False,
        check_tensors: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Load the model."""
        if progress is not None:
            as_function("progress", progress)
        endpoints = as_list("rpc", rpc, '"host:port"')
        check_offload(offload)
        sizes = parse_memory(memory)
        given: dict[str, Any] = {
            "n_ctx": n_ctx,
            "n_parallel": n_parallel,
            "n_batch": n_batch,
            "n_ubatch": n_ubatch,
            "n_threads": n_threads,
            "type_k": type_k,
            "type_v": type_v,
            "flash_attention": flash_attention,
            "repack": repack,
            "kernels": kernels,
            "load_mode": load_mode,
            "pin_weights": pin_weights,
            "offload_min_batch": offload_min_batch,
            "experts": experts,
            "expert_cache": expert_cache,
            "expert_insertions": expert_insertions,
        }
        exchange: dict[str, Any] = {"prompt_tokens": prompt_tokens, "reply_tokens": reply_tokens}
        switches: dict[str, Any] = {
            "adapt_threads": as_flag("adapt_threads", adapt_threads),
            "prompt_cache": prompt_cache,
            "max_pause_s": max_pause_s,
            "vocab_only": as_flag("vocab_only", vocab_only),
            "check_tensors": as_flag("check_tensors", check_tensors),
        }
        settings = checked_settings(**given, **exchange, **switches)
        self._path = resolve(path)
        if isinstance(path, ModelInfo) or overrides is not None:
            info = ModelInfo.from_file(path)
            self.info = info if overrides is None else info.with_overrides(overrides)
        add_rpc_servers(endpoints)
        check_names("memory", sizes)
        check_names("expert_cache", settings.expert_cache, of_gpus=True)
        if isinstance(offload, str) and offload == "tuned":
            offload, tuned = tuned_beside(self.info, given)
            settings = checked_settings(**{**given, **tuned}, **exchange, **switches)
        if "info" in vars(self):
            settings = replace(settings, metadata=self.info.overrides)
        loaded = load(self._path, None if vocab_only else self.info, offload, settings, sizes, progress)
        self._core, self._settings, self._wanted = loaded.native, loaded.settings, loaded.placement
        # Not what studies decode, which are no texts.
        self._remembers_experts = True
        self._evaluation: Evaluation | None = None
        self._logits: NDArray[np.float32] | None = None
        self._dry_breakers: dict[tuple[str, ...], list[list[int]]] = {}
        self._full_context = FullContext(self._path.name, self.n_ctx)
        _open_models.add(self)

    @cached_property
    def placement(self) -> Placement:
        """The device of every tensor and of each layer's KV cache, as llama.cpp reports them after loading."""
        memory = self._core.memory()
        wanted = self._wanted or Placement.cpu(self.info)
        return wanted.read_back(
            {tensor.name: tensor.device for tensor in memory.tensors},
            [(cache.device, cache.n_bytes) for cache in sorted(memory.kv, key=lambda cache: cache.layer)],
        )

    @property
    @absent_on_error
    def memory(self) -> dict[str, MemoryUse]:
        """The bytes on each device for weights, KV cache and computation, as llama.cpp has allocated them.

        If the file is mapped, the weights on the CPU count as the part of the file from the first to the last of them.
        ``pinned_bytes`` of the CPU grows while mapped weights are registered in the background; ``pinning`` says in
        words how far that is, or why it was given up.
        """
        counts = self._core.expert_counts()
        pools = {} if self._wanted is None or counts is None or counts.is_off else self._wanted.expert_cache
        return memory_by_device(self._core.memory(), pools, self._core.pinned())

    @property
    @absent_on_error
    def prompt_cache_bytes(self) -> int:
        """The bytes of RAM that sequences without a place take now, at most ``prompt_cache``."""
        return self._core.prompt_cache_bytes()

    @property
    def path(self) -> Path:
        """The file that was loaded."""
        return self._path

    @cached_property
    def info(self) -> ModelInfo:
        """The file's header: architecture, layers, experts, bytes by part."""
        return ModelInfo.from_file(self._path)

    @cached_property
    def _read_bytes(self) -> ReadBytes:
        return ReadBytes(self.info, self._settings.type_k, self._settings.type_v)

    @property
    def n_ctx(self) -> int:
        """The most tokens of prompt and reply of one stream together; 0 for a vocabulary alone."""
        return self._core.n_ctx

    @property
    def n_vocab(self) -> int:
        """The number of tokens in the vocabulary."""
        return self._core.n_vocab

    @property
    def n_threads(self) -> int:
        """The number of CPU threads that decode."""
        return self._core.n_threads

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        sampling: SamplingOptions | None = None,
        sampler: Sampler | TokenChooser | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        grammar: str | TokenMask | None = None,
        json_schema: str | Mapping[str, Any] | bool | None = None,
        logits: bool = False,
        logprobs: bool | int = False,
        session: str | os.PathLike[str] | None = None,
        reuse: bool = False,
        special: bool = True,
        form: ReplyForm | None = None,
        experts: bool = False,
        **keywords: Unpack[SamplingKeywords],
    ) -> Stream:
        """Return a stream that continues ``prompt``, token by token.

        The first ``next()`` processes the prompt. While your code is busy with a token, the stream computes the next
        one, unless Python code or a :class:`Sampler` of yours takes part in choosing it.

        Parameters
        ----------
        prompt
            A text, or token ids. In a text, written-out special tokens are recognised, and the model's
            beginning-of-sequence token is added; token ids are taken as they are.
        max_tokens
            The most tokens of the reply, at least 1. Default: no limit but the context (``n_ctx``), which a base model
            seldom ends before; leave the loop where you have enough.
        stop
            Texts that end the stream; they are not part of its text.
        sampling
            How tokens are chosen. Default: :attr:`sampling`.
        sampler
            A :class:`Sampler`, whose state goes on from stream to stream; or a function ``f(logits, tokens)`` that
            returns the next token's id, or ``None`` to leave it to the sampling options. ``logits`` is a float32 view
            of shape (n_vocab,) that the function may write to. ``tokens`` is a read-only int32 view of prompt and
            reply so far. An exception of the function ends the stream and reaches you.
        logits_processors
            Functions ``f(logits, tokens)`` that edit the logits in place, called in order before the sampler.
        grammar
            A grammar that the reply cannot leave: in GBNF, llama.cpp's format, with the start symbol ``root``; or
            an object with the methods of :class:`TokenMask`, such as ``overspill.guidance.Guidance``.
        json_schema
            A JSON schema, as a mapping or as JSON. The reply is JSON that fits it, unless ``max_tokens`` or
            the context ends it early.
        logits
            Whether :attr:`Token.logits` can be read.
        logprobs
            Whether tokens have a :attr:`Token.logprob`; a number, 1 to 1000, gives :attr:`Token.top_logprobs` of so
            many tokens too.
        session
            A file for what the KV cache has of prompt and reply. What it has in common with the prompt is loaded and
            not read again; without the file, the stream begins with nothing. It is written as a whole when the stream
            has ended, or is closed after its first token. Before that, after an error, and where the stream has lost
            its place to others, the old file stays. :meth:`save_state` says which models it fits.
        reuse
            Whether to decode only the part of the prompt after its common beginning with the prompt and reply of an
            earlier stream, if they are still in a KV cache. Batches differ then, so that logits may differ in the last
            digits.
        special
            Whether special tokens that are written out in a text are recognised; False for text that you do not trust.
        form
            The constraints of :meth:`chat` on the reply.
        experts
            Whether :meth:`Stream.read_experts` can be called: which experts each layer of a mixture used.
        **keywords
            The fields of :class:`SamplingOptions`, such as ``temperature=0.7``; they overrule ``sampling``.

        Raises
        ------
        ContextFullError
            The prompt alone does not fit into ``n_ctx``.
        ClosedError
            The model is closed.
        UnusableError
            llama.cpp has failed in the middle of a computation of this model, maybe in a step of this stream: close
            the model and load it anew.
        Error
            The model cannot generate text: it is an encoder or a vocabulary alone; ``experts``, and it has none; or
            ``session`` cannot be used, or written at the end.
        ValueError, TypeError
            An argument is out of the range given above, or a grammar or schema cannot be compiled.
        """
        check_keywords(keywords, STREAM_KEYWORDS)
        if isinstance(sampler, Sampler):
            if sampling is not None or keywords:
                raise ValueError("a Sampler has its own options: give either it or sampling options")
        else:
            sampling = merge(self.sampling if sampling is None else sampling, keywords)
        options = GenerationOptions()
        options.max_tokens = n_tokens_at_most(max_tokens)
        options.stop = stop_strings(stop)
        options.grammar, options.mask = constraint(grammar, json_schema)
        options.n_logprobs = n_logprobs(logprobs)
        options.keep_logits = as_flag("logits", logits)
        options.reuse = as_flag("reuse", reuse) or session is not None
        if form is not None:
            options.form = as_instance("form", form, ReplyForm)
        if isinstance(sampler, Sampler):
            options.look_ahead = False
            options.sampler = sampler._core
            options.choose = chooser(None, logits_processors)
        else:
            options.sampler = Sampler(sampling, model=self)._core
            options.choose = chooser(sampler, logits_processors)
        traced = None
        if as_flag("experts", experts):
            self._check_that_it_generates()
            traced = TracedExperts(self.info, self.n_ctx)
            options.recorder = traced.recorder
        tokens = self._prompt("prompt", prompt, special)
        context = self._full_context if max_tokens is None else None
        keep = None
        if session is not None:
            opened = self._session(session)
            options.saved, options.keeps_state, keep = opened.state, True, opened.keep
        generation = self._core.open_stream(tokens, options)
        return Stream(generation, self._read_bytes, traced, CachedExperts(self._core), context, keep)

    def _session(self, path: str | os.PathLike[str]) -> Session:
        if isinstance(path, Session):
            return path
        self._check_that_it_generates()
        return Session(path, self._states)

    @cached_property
    def _states(self) -> SavedStates:
        return SavedStates(self._core, self.info, self._settings.type_k, self._settings.type_v)

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Write what the KV cache has of the stream that decoded last, with its tokens, to a file.

        It fits the same model with the same ``type_k``, ``type_v`` and flash attention, in the same version of
        llama.cpp, whichever devices the layers are on, and with any ``n_ctx`` that holds its tokens. A checksum tells
        damage. An earlier file is replaced as a whole: an interruption leaves the old one.

        Raises
        ------
        Error
            Nothing was decoded yet, or the file cannot be written.
        ClosedError, UnusableError, ValueError, TypeError
            As for :meth:`stream`.
        """
        file = as_path("path", path)
        self._check_that_it_generates()
        state = self._core.save_state([])
        if state is None:
            raise Error("there is no state to save yet: stream something first")
        self._states.write(file, state)

    def load_state(self, path: str | os.PathLike[str]) -> None:
        """Load the state in a file, for later streams with ``reuse=True``, such as those of :meth:`chat`.

        It takes the place in a KV cache that was used least recently, and stays until the place is needed.

        Raises
        ------
        Error
            The file is missing or damaged, or does not fit (see :meth:`save_state`); or open streams have all places.
        ContextFullError
            It has more tokens than ``n_ctx``.
        ClosedError, UnusableError, ValueError, TypeError
            As for :meth:`stream`.
        """
        file = as_path("path", path)
        self._check_that_it_generates()
        state = self._states.read(file)
        self._core.restore_state(state)
        self._remember(state)

    def _remember(self, state: SequenceState | None) -> None:
        """Have the prompts of chats written in the tokens of a state, where they begin with its text."""
        if state is not None and self.has_chat_template:
            with suppress(Error):  # of a template that has mistakes
                self.chat_template._remember(state.parts()[0].tolist())

    def _prompt(self, name: str, prompt: str | Sequence[int], special: bool) -> list[int]:
        special = as_flag("special", special)
        if isinstance(prompt, str):
            return self.tokenize(as_text(name, prompt), parse_special=special)
        if isinstance(prompt, bytes | bytearray):
            raise TypeError(f"{name} must be a string or a sequence of token ids, not bytes: decode them first")
        return token_ids(name, prompt)

    def _check_that_it_generates(self) -> None:
        """Raise the error that a stream of an encoder, or of a vocabulary alone, raises."""
        if self.n_ctx == 0:
            self._core.open_stream([0], GenerationOptions())

    def astream(self, prompt: str | Sequence[int], **options: Unpack[StreamKeywords]) -> AsyncStream[Token]:
        """Return a stream for ``async for`` that continues ``prompt``; options (but ``experts``) as for :meth:`stream`.

        >>> async with model.astream("Why is the sky blue?", max_tokens=256) as stream:
        ...     async for token in stream:
        ...         print(token, end="", flush=True)

        The first step raises the errors of :meth:`stream`; an option that there is not is a TypeError at once.
        ``asyncio.timeout``, ``task.cancel()`` and Ctrl-C end the stream in the middle of a step; see
        :class:`AsyncStream`.
        """
        check_keywords(options, STREAM_KEYWORDS)
        return AsyncStream(lambda: self.stream(prompt, **options))

    @property
    @absent_on_error
    def has_chat_template(self) -> bool:
        """Whether the file has a chat template, which :meth:`chat` needs."""
        return self._core.has_chat_template

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The file's chat template; an :class:`Error` if it has none. It may be replaced."""
        return ChatTemplate(self)

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        tool_choice: ToolChoice = "auto",
        reasoning_effort: str | None = None,
        thinking: bool = True,
        json_schema: str | Mapping[str, Any] | bool | None = None,
        on_full: OnFull = "error",
        **options: Unpack[ReplyKeywords],
    ) -> ChatStream:
        """Return the stream of a reply to a conversation, in the model's own format.

        The beginning that the conversation shares with the prompt and reply of an earlier stream is not decoded again,
        if it is still in a KV cache.

        Parameters
        ----------
        messages
            A question, or the messages of a conversation: mappings with the keys of OpenAI's API.

            - ``role``: ``"system"``, ``"developer"``, ``"user"``, ``"assistant"`` or ``"tool"``, or another one that
              the template knows;
            - ``content``: the text, or a list of parts such as ``{"type": "text", "text": "Hello"}``;
            - ``reasoning_content`` and ``tool_calls``, of assistants;
            - ``tool_call_id`` and ``name``, of tools;
            - ``trusted``: whether names of control tokens in the message make these tokens. Without it they stay text.
        tools
            Tools that the model may ask for: functions with types and a docstring, or descriptions with the keys of
            OpenAI's API; for ``parameters``, MCP's ``inputSchema`` and Anthropic's ``input_schema`` will do. They are
            not called; see :attr:`ChatStream.tool_calls`.
        tool_choice
            ``"auto"``: the model calls a tool or answers; ``"required"``: it calls one; ``"none"``: it calls none.
        reasoning_effort
            ``"low"``, ``"medium"`` or ``"high"``, for models that know it, such as gpt-oss.
        thinking
            False asks the model for an answer without reasoning, if it can do without.
        json_schema
            A JSON schema, as a mapping or as JSON. The answer is JSON that fits it; reasoning before it is free.
        on_full
            If the conversation does not fit into ``n_ctx``:

            - ``"error"``: a :class:`ContextFullError`;
            - ``"shift"``: the oldest turns are left out, and forgotten as the reply grows. A reply ends at a full
              context if the model cannot forget a part of what it read.
        **options
            Options of :meth:`stream`: ``max_tokens``, ``stop``, sampling options, ``logprobs`` and so on; all but
            ``experts``, ``reuse``, which is on, and ``special``, for which ``trusted`` stands here.

        Raises
        ------
        Error
            The model has no chat template, or it would compute for too long or take too much memory.
        ContextFullError
            The conversation does not fit into ``n_ctx``.
        ClosedError, UnusableError
            As for :meth:`stream`.
        ValueError, TypeError
            A message or a tool is not of that form, or the template refuses it; or as for :meth:`stream`.
        """
        check_keywords(options, CHAT_KEYWORDS)
        if (path := options.get("session")) is not None:
            options["session"] = opened = self._session(path)
            self._remember(opened.state)
        prompt = self.chat_template.prepare(
            messages,
            tools=tools,
            tool_choice=tool_choice,
            reasoning_effort=reasoning_effort,
            thinking=thinking,
            json_schema=json_schema,
            on_full=on_full,
        )
        stream = self.stream(prompt.tokens, reuse=True, form=prompt.form, **options)
        prompt.remember()
        return ChatStream(stream, prompt.form, prompt.remember, n_dropped=prompt.n_dropped)

    def achat(self, messages: str | Sequence[Message], **options: Unpack[ChatKeywords]) -> AsyncChatStream:
        """Return the stream of a reply to a conversation for ``async for``; options as for :meth:`chat`.

        >>> async for token in model.achat("Why is the sky blue?"):
        ...     print(token, end="", flush=True)

        It is to :meth:`chat` what :meth:`astream` is to :meth:`stream`.
        """
        check_keywords(options, CHAT_KEYWORDS)
        return AsyncChatStream(lambda: self.chat(messages, **options))

    def ask(
        self, prompt: str | Sequence[Message], *, system: str | None = None, **options: Unpack[ChatKeywords]
    ) -> ChatReply:
        """Return the whole reply to a question.

        >>> reply = model.ask("Why is the sky blue?", max_tokens=200)
        >>> print(reply.text)

        Parameters
        ----------
        prompt
            A question, or the messages of a conversation, as for :meth:`chat`.
        system
            The system message, which goes before the others.
        **options
            Options of :meth:`chat`. The reply ends by itself, or when it has ``max_tokens``, or as the context
            (``n_ctx``) is full: of the last a warning tells once, unless ``max_tokens`` is given.

        Raises
        ------
        ContextFullError, ClosedError, UnusableError, Error, ValueError, TypeError
            As for :meth:`chat`.
        """
        check_keywords(options, CHAT_KEYWORDS | {"system"})
        return self.chat(_with_system(prompt, system), **options).finish()

    async def aask(
        self, prompt: str | Sequence[Message], *, system: str | None = None, **options: Unpack[ChatKeywords]
    ) -> ChatReply:
        """Return the whole reply to a question, without blocking the event loop; as :meth:`ask`."""
        check_keywords(options, CHAT_KEYWORDS | {"system"})
        return await self.achat(_with_system(prompt, system), **options).finish()

    def eval(self, tokens: Sequence[int], *, logits: Literal["last", "all"] = "last") -> NDArray[np.float32]:
        """Return the logits after ``tokens``, which follow those of earlier calls: the decode loop by hand.

        >>> tokens = model.tokenize("The capital of France is")
        >>> logits = model.eval(tokens)
        >>> while not model.is_end_of_generation(token := sampler.sample(logits)):
        ...     sampler.accept(token)
        ...     logits = model.eval([token])

        All calls share one context, which streams do not use; :meth:`reset` empties it.

        Parameters
        ----------
        tokens
            At least one token id; :meth:`tokenize` makes them of a text.
        logits
            ``"last"``: one row, for the token after the last; ``"all"``: a row after each token. The first call
            with more rows than any before builds a new context and decodes everything again.

        Returns
        -------
        numpy.ndarray
            float32, of shape (n_vocab,), or (len(tokens), n_vocab) for ``"all"``. The array is a writable view on
            llama.cpp's own memory, which it keeps alive. **The next eval() overwrites it**: ``.copy()`` what you need
            longer.

        Raises
        ------
        BufferError
            More rows than before need a larger buffer, while views of the present one are in use.
        ContextFullError, ClosedError, UnusableError, Error, ValueError, TypeError
            As for :meth:`stream`.
        """
        check_choice("logits", logits, ("last", "all"))
        if self._evaluation is None:
            if self.closed:
                raise ClosedError(f"the model {self._path} is closed")
            self._check_that_it_generates()
            self._evaluation = Evaluation(self._core)
        self._logits = None  # so that it does not count as in use
        values = self._evaluation.eval(token_ids("tokens", tokens), logits == "all")
        self._logits = values[-1] if logits == "all" else values
        return values

    @property
    @absent_on_error
    def logits(self) -> NDArray[np.float32]:
        """The logits after the last token of :meth:`eval`: such a view, float32 of shape (n_vocab,).

        A stream's logits are in its tokens: see :attr:`Token.logits`.
        """
        if self._logits is None:
            raise Error(
                "there are no logits yet: model.eval(tokens) makes them; a stream's are in its tokens, with "
                "stream(logits=True)"
            )
        return self._logits

    def reset(self) -> None:
        """Forget the tokens of :meth:`eval`."""
        if self._evaluation is not None:
            self._evaluation.reset()
        self._logits = None

    @cached_property
    def sampling(self) -> SamplingOptions:
        """The sampling options of :meth:`stream` where no others are given: the file's, or else the defaults."""
        replaced = self._settings.metadata
        return SamplingOptions.from_metadata(lambda key: replaced[key] if key in replaced else self._core.metadata(key))

    def dry_breakers(self, texts: Sequence[str]) -> list[list[int]]:
        """Return every sequence of token ids in which one of the texts can be written, for DRY."""
        key = tuple(as_text("texts", text) for text in as_list("texts", texts, "strings"))
        if key not in self._dry_breakers:
            self._dry_breakers[key] = self._core.dry_breakers(list(key))
        return self._dry_breakers[key]

    def generate(self, prompt: str | Sequence[int], **options: Unpack[StreamKeywords]) -> Completion:
        """Return the whole reply to ``prompt``; options (but ``experts``) and errors as for :meth:`stream`.

        Give ``max_tokens``: without it, the reply of a base model seldom ends before the context (``n_ctx``) is full. A
        warning says so once.
        """
        check_keywords(options, STREAM_KEYWORDS)
        with self.stream(prompt, **options) as stream:
            tokens = list(stream)
        stream._tell_of_full_context()
        return Completion("".join(token.text for token in tokens), tokens, stream.stats)

    def generate_many(
        self,
        prompts: Iterable[str | Sequence[int]],
        *,
        parallel: int = 16,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        sampling: SamplingOptions | None = None,
        grammar: str | None = None,
        json_schema: str | Mapping[str, Any] | bool | None = None,
        logprobs: bool | int = False,
        special: bool = True,
        **keywords: Unpack[SamplingKeywords],
    ) -> Iterator[tuple[int, Completion]]:
        """Return an iterator of replies to many prompts, each as it ends: its index in ``prompts``, and the reply.

        The replies under way are decoded in one batch, which reads the weights once for all of them. As soon as one
        ends, the next begins. A batch rounds otherwise than a single token: where two tokens are about as likely, a
        reply may differ from that of :meth:`generate`. Times in ``stats`` are those of the batches.

        Parameters
        ----------
        prompts
            Texts or token ids, as for :meth:`stream`.
        parallel
            The most replies at a time, 1 to 256. Each has a KV cache of its own, for the longest prompt and
            ``max_tokens`` together.
        max_tokens, stop, sampling, grammar, json_schema, logprobs, special, **keywords
            As for :meth:`stream`, for each reply; with a ``seed``, each begins with that one. Give ``max_tokens`` to a
            base model, whose replies may otherwise all run until the context is full; a warning says so once.

        Raises
        ------
        ContextFullError
            A prompt does not fit into ``n_ctx``.
        OutOfMemoryError
            There is too little memory for so many KV caches.
        ClosedError, UnusableError, Error, ValueError, TypeError
            As for :meth:`stream`.
        """
        listed = as_list("prompts", prompts, "texts or lists of token ids")
        tokens = [self._prompt(f"prompts[{i}]", prompt, special) for i, prompt in enumerate(listed)]
        parallel = as_integer("parallel", parallel, 1, 256)
        sampling = merge(self.sampling if sampling is None else sampling, keywords)
        limit = n_tokens_at_most(max_tokens)
        stops = stop_strings(stop)
        counted = n_logprobs(logprobs)
        rules, mask = constraint(grammar, json_schema)
        if mask is not None:
            raise TypeError("grammar must be GBNF here: a mask has the state of one reply")
        self._check_that_it_generates()
        longest = max(map(len, tokens), default=1)
        for i, prompt in enumerate(tokens):
            self._check_prompt(i, prompt)
        n_ctx = self.n_ctx if limit < 0 else min(self.n_ctx, longest + limit)
        if self._settings.n_parallel:  # which have their caches
            parallel = min(parallel, self._settings.n_parallel)
        else:
            check_ram_for_caches(self.info, self._settings, self._wanted, min(parallel, len(tokens)), n_ctx)

        def open_stream(prompt: list[int]) -> Generation:
            options = GenerationOptions()
            options.max_tokens, options.stop, options.n_logprobs, options.grammar = limit, stops, counted, rules
            options.sampler = Sampler(sampling, model=self)._core
            options.eager = True
            return self._core.open_stream(prompt, options)

        context = self._full_context if max_tokens is None else None
        return self._completions(Replies(tokens, open_stream, parallel), context)

    def _check_prompt(self, i: int, prompt: list[int]) -> None:
        self._core.check_tokens(f"prompts[{i}]", prompt)
        if len(prompt) > self.n_ctx:
            raise ContextFullError(f"prompt {i} has {len(prompt)} tokens, but a context holds {self.n_ctx}")

    @staticmethod
    def _completions(replies: Replies, context: FullContext | None) -> Iterator[tuple[int, Completion]]:
        try:
            for i, tokens, native in replies:
                stats = stats_of(native, None)
                if context is not None:
                    context.check(stats)
                yield i, Completion("".join(token.text for token in tokens), tokens, stats)
        finally:
            replies.close()

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the token ids of ``text``.

        Parameters
        ----------
        text
            Any text that can be encoded in UTF-8.
        add_special
            Whether to add the special tokens that the model expects around a text, such as beginning-of-sequence.
        parse_special
            Whether to recognise special tokens that are written out in the text; give False for text that you do
            not trust.
        """
        add_special, parse_special = as_flag("add_special", add_special), as_flag("parse_special", parse_special)
        return self._core.tokenize(as_text("text", text).encode(), add_special, parse_special)

    def detokenize(self, tokens: Sequence[int], *, skip_special: bool = False) -> str:
        """Return the text of ``tokens``; invalid UTF-8 becomes U+FFFD. ``skip_special`` leaves special tokens out."""
        ids = token_ids("tokens", tokens)
        return self._core.detokenize(ids, as_flag("skip_special", skip_special)).decode(errors="replace")

    def token_bytes(self, token: int, *, special: bool = True) -> bytes:
        """Return the bytes of one token, which may be part of a character; of a special token its name, or b""."""
        return self._core.token_bytes(as_integer("token", token, 0, 2**31 - 1), as_flag("special", special))

    @property
    @absent_on_error
    def special_tokens(self) -> dict[str, int]:
        """The ids of the special tokens that the model has, by role: bos, eos, eot, sep, nl, pad, mask."""
        return self._core.special_tokens()

    def is_end_of_generation(self, token: int) -> bool:
        """Return whether ``token`` ends a reply."""
        return self._core.is_end_of_generation(as_integer("token", token, 0, 2**31 - 1))

    def close(self) -> None:
        """End the open streams and free the memory. Idempotent; later use raises :class:`ClosedError`.

        The memory of logits stays as long as arrays are views on it.
        """
        counts = self._core.expert_counts()
        self._core.close()  # which may refuse, and then nothing has changed
        if counts is not None and self._remembers_experts and self._core.closed:
            is_faster = False if counts.is_off else True if counts.is_proven else None
            keep_expert_profile(self.info, ExpertProfile(self._core.expert_profile(), is_faster))
        self._logits = None
        self._evaluation = None

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._core.closed

    def __enter__(self) -> Model:
        """Return the model itself; it is closed when the block is left."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the model."""
        self.close()

    def __repr__(self) -> str:
        """Return the file's name and the context's size."""
        state = "closed" if self.closed else f"n_ctx={self.n_ctx}"
        return short_repr(self, f"{shown(self._path.name)} {state}")


LOAD_KEYWORDS = keywords_of(Model.__init__)


def _with_system(prompt: str | Sequence[Message], system: str | None) -> Sequence[Message]:
    """Return the messages of a conversation behind a system message, if there is one."""
    with naming("prompt"):
        messages = checked_messages(prompt)
    return messages if system is None else [{"role": "system", "content": as_text("system", system)}, *messages]
