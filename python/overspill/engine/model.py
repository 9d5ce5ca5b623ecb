"""Load a model, and pull tokens out of it."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Unpack

import numpy as np
from numpy.typing import NDArray

from overspill import _core
from overspill.base.checks import as_integer
from overspill.base.values import (
    DEFAULT_CACHE_TYPE,
    DEFAULT_LOAD_MODE,
    DEFAULT_SWITCH,
    CacheType,
    Completion,
    LoadMode,
    LogitsProcessor,
    MemoryUse,
    Progress,
    Switch,
    TokenChooser,
    TokenMask,
    is_given,
)
from overspill.engine.arguments import chooser, constraint, n_logprobs, n_tokens_at_most, stop_strings, token_ids
from overspill.engine.async_stream import AsyncStream
from overspill.engine.loading import Offload, check_ram_for_caches, checked_settings, load
from overspill.engine.reply import ChatStream, ReplyForm
from overspill.engine.stream import ReadBytes, Stream, stats_of
from overspill.engine.template import ChatTemplate, Message, OnFull, ToolChoice
from overspill.engine.tools import Tool
from overspill.header.info import ModelInfo
from overspill.hub import resolve
from overspill.machine.devices import add_rpc_server
from overspill.placement.placement import Placement
from overspill.planning.tuned import tuned_options
from overspill.sampling.options import SamplingKeywords, SamplingOptions, merge
from overspill.sampling.sampler import Sampler

__all__ = ["Model"]

_open_models: weakref.WeakSet[Model] = weakref.WeakSet()


@atexit.register
def _close_models() -> None:
    # A stream may be at work on its next token, which must not outlive the interpreter.
    for model in list(_open_models):
        model.close()


class Model:
    """A language model from a GGUF file, loaded and ready to stream.

    A model may be used from several threads. Each open stream has a context (a KV cache)
    of its own, and the streams' steps take turns: one step of one stream at a time.

    Parameters
    ----------
    path
        The GGUF file; of a split model, its first file. ``hf:OWNER/REPOSITORY/FILE.gguf`` is brought
        from the Hugging Face hub (see :func:`overspill.hub.resolve`).
    offload
        What goes to the GPU: ``"auto"`` (what :func:`overspill.plan` finds fastest; if a GPU refuses the
        memory after all, less), ``"cpu"`` (nothing, the GPU is not touched), ``"gpu"`` (everything; an
        :class:`Error` without a GPU), the number of layers, as llama.cpp's ``n_gpu_layers`` counts them
        (the output head is the first, and the last layers come next), ``"tuned"`` (what ``overspill tune`` found
        fastest for this model on this machine, other settings included), a :class:`Placement`, or a mapping such as
        ``{"default": "gpu", "experts": "cpu"}`` (see :meth:`Placement.apply`).
    rpc
        Endpoints, ``"host:port"``, of servers (``overspill serve-device``) whose devices are added first, as
        :func:`add_rpc_server` does.
    n_ctx
        Tokens that prompt and reply may have together, at least 1. Default: what the model was
        trained for, at most 8192; the KV cache's memory grows with it.
    n_batch
        Tokens of a prompt that are processed at once, 1 to 65536. 512 is llama.cpp's default for
        a physical batch; a GPU's prefill is cancelled between batches.
    n_ubatch
        Of which so many are computed at once, 1 to ``n_batch``. Default: ``n_batch``. Compute buffers grow with it.
    n_threads
        CPU threads, 1 to 512. Default: the physical cores, since decoding waits for memory.
    type_k, type_v
        What the KV cache's keys and values are stored as: ``"f16"``, ``"q8_0"`` (half the memory) and others of
        llama.cpp's. Quantized values need flash attention.
    flash_attention
        ``"auto"`` (where every device can), ``"on"`` or ``"off"``.
    repack
        Whether weights on the CPU are loaded in the order that its matrix products like best, which is faster and takes
        RAM beside a mapped file, and rounds otherwise: ``"auto"`` (not beside a CUDA GPU, which could not read them for
        large batches then, nor where a mapped file's weights have no place in RAM), ``"on"`` or ``"off"``.
    load_mode
        ``"mmap"`` maps the file, ``"read"`` reads it into memory (which lets a GPU pin it),
        ``"mlock"`` and ``"mmap+mlock"`` keep it from being swapped out, ``"direct-io"`` reads
        past the page cache.
    memory
        How much of a device's memory the model may use, as in ``{"CUDA0": "20GiB", "cpu": "100GiB"}``; ``"gpu"`` is
        the first GPU. Default: what is free. ``offload="auto"`` heeds it.
    vocab_only
        Load the vocabulary alone, to tokenize; such a model cannot stream.
    check_tensors
        Look for invalid values in the weights while loading; slower.
    progress
        Called with the share that is loaded, 0.0 to 1.0, from this thread; returning ``False``
        cancels the load with :class:`CancelledError`, an exception reaches the caller.

    Raises
    ------
    ModelLoadError
        The file is missing, is not a GGUF, is damaged, or is not of a known architecture.
    OutOfMemoryError
        A device has too little memory for its part; of RAM, before any of it is used.
    Error
        Anything else that llama.cpp could not do, or an RPC server that was lost.
    ValueError, TypeError
        An argument is out of the range given above, or a placement is for another model, or not possible.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        offload: Offload = "auto",
        rpc: Sequence[str] = (),
        n_ctx: int | None = None,
        n_batch: int = 512,
        n_ubatch: int | None = None,
        n_threads: int | None = None,
        type_k: CacheType = DEFAULT_CACHE_TYPE,
        type_v: CacheType = DEFAULT_CACHE_TYPE,
        flash_attention: Switch = DEFAULT_SWITCH,
        repack: Switch = DEFAULT_SWITCH,
        load_mode: LoadMode = DEFAULT_LOAD_MODE,
        memory: Mapping[str, int | str] | None = None,
        vocab_only: bool = False,
        check_tensors: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Load the model."""
        if progress is not None and not callable(progress):
            raise TypeError(f"progress must be callable, not {progress!r}")
        if isinstance(rpc, str):
            raise TypeError(f'rpc must be a sequence of "host:port", not {rpc!r}')
        given: dict[str, Any] = {
            "n_ctx": n_ctx,
            "n_ubatch": n_ubatch,
            "n_threads": n_threads,
            "type_k": type_k,
            "type_v": type_v,
            "flash_attention": flash_attention,
            "repack": repack,
            "load_mode": load_mode,
        }
        settings = checked_settings(
            n_batch=n_batch, vocab_only=bool(vocab_only), check_tensors=bool(check_tensors), **given
        )
        self._path = resolve(path)
        if isinstance(path, ModelInfo):
            self.info = path
        for endpoint in rpc:
            add_rpc_server(endpoint)
        if offload == "tuned":
            tuned = tuned_options(self.info)
            offload = tuned.pop("offload")
            tuned["n_ubatch"] = min(tuned["n_ubatch"], settings.n_batch)
            settings = replace(settings, **{name: tuned[name] for name in tuned if not is_given(given[name])})
        loaded = load(self._path, None if vocab_only else self.info, offload, settings, memory or {}, progress)
        self._core, self._settings, self._wanted = loaded.native, loaded.settings, loaded.placement
        self._evaluation: _core.Evaluation | None = None
        self._logits: NDArray[np.float32] | None = None
        self._dry_breakers: dict[tuple[str, ...], list[list[int]]] = {}
        _open_models.add(self)

    @cached_property
    def placement(self) -> Placement:
        """Where every tensor and each layer's KV cache lie: read back from llama.cpp after loading."""
        memory = self._core.memory()
        wanted = self._wanted or Placement.cpu(self.info)
        return wanted.read_back(
            {name: device for name, device, _, _ in memory["tensors"]},
            [(device, n_bytes) for _, device, n_bytes in sorted(memory["kv"])],
        )

    @cached_property
    def memory(self) -> dict[str, MemoryUse]:
        """Bytes on each device for weights, KV cache and computation, as llama.cpp has allocated them.

        Of a file that is mapped, weights on the CPU count as the part of the file from the first to the last.
        """
        return {device: MemoryUse(**use) for device, use in self._core.memory()["devices"].items()}

    @property
    def path(self) -> Path:
        """The file that was loaded."""
        return self._path

    @cached_property
    def info(self) -> ModelInfo:
        """What the file's header says: architecture, layers, experts, bytes by part."""
        return ModelInfo.from_file(self._path)

    @cached_property
    def _read_bytes(self) -> ReadBytes:
        return ReadBytes(self.info, self._settings.type_k, self._settings.type_v)

    @property
    def n_ctx(self) -> int:
        """Tokens that prompt and reply of one stream may have together; 0 for a vocabulary alone."""
        return self._core.n_ctx

    @property
    def n_vocab(self) -> int:
        """Number of tokens in the vocabulary."""
        return self._core.n_vocab

    @property
    def n_threads(self) -> int:
        """CPU threads that decode."""
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
        reuse: bool = False,
        form: ReplyForm | None = None,
        **keywords: Unpack[SamplingKeywords],
    ) -> Stream:
        """Continue ``prompt``, token by token.

        The prompt is processed by the first ``next()``. While your code is busy with a token, the next one
        is worked on already, unless Python code of yours or a :class:`Sampler` of yours takes part in choosing it.

        Parameters
        ----------
        prompt
            Text (special tokens written out in it are recognised, and the model's own
            beginning-of-sequence token is added), or token ids, taken as they are.
        max_tokens
            Stop after so many tokens, at least 1. Default: when the model or the context ends.
        stop
            Text that ends the stream; it is not part of what comes out.
        sampling
            How tokens are chosen. Default: :attr:`sampling`, what the file recommends over llama.cpp's defaults.
        sampler
            A :class:`Sampler` of yours, whose state goes on from stream to stream; or ``f(logits, tokens)``, called
            for each token, which returns the id to take, or ``None`` to leave it to the sampling options. ``logits``
            is a float32 view of shape (n_vocab,) that it may write to, ``tokens`` a read-only int32 view of prompt and
            reply so far. What it raises ends the stream and reaches you.
        logits_processors
            Functions ``f(logits, tokens)`` that edit the logits in place, called in order before the sampler.
        grammar
            GBNF, llama.cpp's grammar format, whose start symbol is ``root``; or anything with the methods of
            :class:`TokenMask`, such as ``overspill.guidance``'s. The reply cannot leave it.
        json_schema
            A JSON schema, as a mapping or as JSON; the reply is JSON that fits it, unless ``max_tokens`` or
            the context ends it early.
        logits
            Fill in :attr:`Token.logits`.
        logprobs
            Fill in :attr:`Token.logprob`; a number, 1 to 1000, also :attr:`Token.top_logprobs` with so many tokens.
        reuse
            Do not decode again what the prompt has in common with the model's latest stream, prompt and reply. Its
            batches are others then, so that logits may differ in the last digits.
        form
            What :meth:`chat` wants of the reply.
        **keywords
            The fields of :class:`SamplingOptions`, such as ``temperature=0.7``; they overrule ``sampling``.

        Raises
        ------
        ContextFullError
            The prompt alone does not fit into ``n_ctx``.
        ClosedError
            The model is closed.
        Error
            The model cannot generate text, such as an encoder or a vocabulary alone.
        ValueError, TypeError
            An argument is out of the range given above, or a grammar or schema cannot be compiled.
        """
        stops = stop_strings(stop)
        if isinstance(sampler, Sampler):
            if sampling is not None or keywords:
                raise ValueError("a Sampler has its own options: give either it or sampling options")
        else:
            sampling = merge(self.sampling if sampling is None else sampling, keywords)
        gbnf, mask = constraint(grammar, json_schema)
        form = form or ReplyForm()
        if form.grammar is not None:
            if gbnf is not None or mask is not None:
                raise ValueError("give either tools or grammar: calls to tools have a grammar of their own")
            gbnf = form.grammar
        generation = self._core.open_stream(
            self.tokenize(prompt) if isinstance(prompt, str) else token_ids("prompt", prompt),
            sampler=(sampler if isinstance(sampler, Sampler) else Sampler(sampling, model=self))._core,
            max_tokens=n_tokens_at_most(max_tokens),
            stop=[*stops, *form.stop],
            logprobs=n_logprobs(logprobs),
            grammar=gbnf,
            mask=mask,
            choose=chooser(None if isinstance(sampler, Sampler) else sampler, logits_processors),
            logits=bool(logits),
            look_ahead=not isinstance(sampler, Sampler),
            reuse=bool(reuse),
            named=form.named,
            droppable=form.droppable,
            trigger_patterns=form.trigger_patterns,
            trigger_tokens=form.trigger_tokens,
            begun=form.begun,
        )
        return Stream(generation, self._read_bytes)

    def astream(self, prompt: str | Sequence[int], **options: Any) -> AsyncStream:
        """Continue ``prompt`` for ``async for``; takes what :meth:`stream` takes.

        >>> async with model.astream("Why is the sky blue?", max_tokens=256) as stream:
        ...     async for token in stream:
        ...         print(token, end="", flush=True)

        Raises what :meth:`stream` raises, at the first step. ``asyncio.timeout``, ``task.cancel()`` and Ctrl-C end it
        in the middle of one; see :class:`AsyncStream`.
        """
        return AsyncStream(lambda: self.stream(prompt, **options))

    @property
    def has_chat_template(self) -> bool:
        """Whether the file has a chat template, so that :meth:`chat` knows how the model is to be addressed."""
        return self._core.has_chat_template

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """How the file says that conversations are put to the model; an :class:`Error` if it does not."""
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
        **options: Any,
    ) -> ChatStream:
        """Stream a reply to a conversation, in the model's own format.

        What the conversation has in common with the latest stream, prompt and reply, is not decoded again.

        Parameters
        ----------
        messages
            A question, or the conversation: mappings as OpenAI's API has them, with ``role`` (``"system"``,
            ``"user"``, ``"assistant"``, ``"tool"``) and ``content``; of assistants also ``reasoning_content`` and
            ``tool_calls``, of tools ``tool_call_id`` and ``name``.
        tools
            What the model may ask for: functions of yours, whose signature and docstring say what they are for, or
            descriptions as OpenAI's API has them. They are not called; see :attr:`ChatStream.tool_calls`.
        tool_choice
            ``"auto"`` leaves it to the model, ``"required"`` makes it call one, ``"none"`` forbids it.
        reasoning_effort
            For models that know it, such as gpt-oss: ``"low"``, ``"medium"`` or ``"high"``.
        thinking
            False asks models that can do without reasoning not to.
        json_schema
            The answer is JSON that fits it; reasoning before it is free.
        on_full
            ``"error"``: a conversation that does not fit into ``n_ctx`` is a :class:`ContextFullError`; ``"shift"``:
            its oldest turns are left out, and forgotten while the reply comes, until it does; where the model cannot
            forget some of what it read, a reply that fills the context ends there.
        **options
            Those of :meth:`stream`: ``max_tokens``, ``stop``, sampling options, ``logprobs`` and so on.

        Raises
        ------
        Error
            The model has no chat template.
        ContextFullError
            The conversation does not fit into ``n_ctx``.
        ValueError, TypeError
            A message or a tool is none, or the template refuses it; or as for :meth:`stream`.
        """
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
        return ChatStream(stream, prompt.parser, prompt.remember, named=prompt.form.named, n_dropped=prompt.n_dropped)

    def eval(self, tokens: Sequence[int], *, logits: Literal["last", "all"] = "last") -> NDArray[np.float32]:
        """Decode ``tokens`` after those of earlier calls, and return the logits: the loop by hand.

        >>> tokens = model.tokenize("The capital of France is")
        >>> logits = model.eval(tokens)
        >>> while not model.is_end_of_generation(token := sampler.sample(logits)):
        ...     sampler.accept(token)
        ...     logits = model.eval([token])

        The calls share one context, apart from those of the streams; :meth:`reset` empties it.

        Parameters
        ----------
        tokens
            At least one token id; text goes through :meth:`tokenize` first.
        logits
            ``"last"`` for what follows the last token, ``"all"`` for what follows each. The first call
            with more positions than any before builds a new context and decodes everything again.

        Returns
        -------
        numpy.ndarray
            float32, of shape (n_vocab,), or (len(tokens), n_vocab) for all. Not a copy but a view on llama.cpp's own
            memory: it can be written to, it keeps that memory alive, and **the next eval() overwrites it**.
            Use ``.copy()`` for what you need longer.

        Raises
        ------
        BufferError
            More positions than before need a larger buffer, while views of the present one are in use.
        ContextFullError, ClosedError, Error, ValueError, TypeError
            As for :meth:`stream`.
        """
        if logits not in ("last", "all"):
            raise ValueError(f'logits must be "last" or "all", not {logits!r}')
        if self._evaluation is None:
            if self.closed:
                raise _core.ClosedError(f"the model {self._path} is closed")
            self._evaluation = _core.Evaluation(self._core)
        self._logits = None  # so that it does not count as in use
        values = self._evaluation.eval(token_ids("tokens", tokens), logits == "all")
        self._logits = values[-1] if logits == "all" else values
        return values

    @property
    def logits(self) -> NDArray[np.float32]:
        """The logits after the last token of :meth:`eval`: the same kind of view, float32 of shape (n_vocab,)."""
        if self._logits is None:
            raise _core.Error(
                "there are no logits yet: model.eval(tokens) makes them; a stream's are in its tokens, with "
                "stream(logits=True)"
            )
        return self._logits

    def reset(self) -> None:
        """Forget the tokens of :meth:`eval`."""
        self._logits = None
        if self._evaluation is not None:
            self._evaluation.reset()

    @cached_property
    def sampling(self) -> SamplingOptions:
        """How :meth:`stream` chooses tokens unless told otherwise: what the file recommends over the defaults."""
        return SamplingOptions.from_metadata(self._core.metadata)

    def dry_breakers(self, texts: Sequence[str]) -> list[list[int]]:
        """Return every sequence of tokens in which one of the texts can be written, for DRY."""
        key = tuple(texts)
        if key not in self._dry_breakers:
            self._dry_breakers[key] = self._core.dry_breakers(list(key))
        return self._dry_breakers[key]

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Completion:
        """Return the whole reply; takes what :meth:`stream` takes, and raises what it raises."""
        with self.stream(prompt, **options) as stream:
            tokens = list(stream)
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
        **keywords: Unpack[SamplingKeywords],
    ) -> Iterator[tuple[int, Completion]]:
        """Continue many prompts together, and yield each reply as it ends: its place in ``prompts``, and the reply.

        All that are under way are decoded in one batch, which reads the weights once for all of them; as soon as one
        ends, the next begins. A batch rounds otherwise than one token alone does, so where two tokens are about
        as likely, a reply may go another way than :meth:`generate`'s. Times in ``stats`` are those of the batches.

        Parameters
        ----------
        prompts
            Texts or token ids, as for :meth:`stream`.
        parallel
            At most so many at a time, 1 to 256. Each has a KV cache of its own, as long as the longest prompt and
            ``max_tokens`` together.
        max_tokens, stop, sampling, grammar, json_schema, logprobs, **keywords
            As for :meth:`stream`, for each of them; with a ``seed``, each begins with that one.

        Raises
        ------
        ContextFullError
            A prompt does not fit into ``n_ctx``.
        OutOfMemoryError
            There is too little memory for so many KV caches.
        ClosedError, Error, ValueError, TypeError
            As for :meth:`stream`.
        """
        if isinstance(prompts, str):
            raise TypeError(f"prompts must be a sequence of texts, not {prompts!r:.80}")
        tokens = [
            self.tokenize(prompt) if isinstance(prompt, str) else token_ids(f"prompts[{i}]", prompt)
            for i, prompt in enumerate(prompts)
        ]
        parallel = as_integer("parallel", parallel, 1, 256)
        sampling = merge(self.sampling if sampling is None else sampling, keywords)
        gbnf, mask = constraint(grammar, json_schema)
        if mask is not None:
            raise TypeError("grammar must be GBNF here: a mask has the state of one reply")
        limit = n_tokens_at_most(max_tokens)
        longest = max(map(len, tokens), default=1)
        n_ctx = self.n_ctx if limit < 0 else min(self.n_ctx, longest + limit)
        check_ram_for_caches(self.info, self._settings, self._wanted, min(parallel, len(tokens)), n_ctx)
        batch = self._core.open_batch(
            tokens,
            samplers=[Sampler(sampling, model=self)._core for _ in tokens],
            max_tokens=limit,
            stop=stop_strings(stop),
            logprobs=n_logprobs(logprobs),
            grammar=gbnf,
            parallel=parallel,
            n_ctx=n_ctx,
        )
        return self._completions(batch)

    @staticmethod
    def _completions(batch: _core.BatchGeneration) -> Iterator[tuple[int, Completion]]:
        try:
            for i, reply, stats in batch:
                yield i, Completion("".join(token.text for token in reply), reply, stats_of(stats, None))
        finally:
            batch.close()

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the token ids of ``text``.

        Parameters
        ----------
        text
            Any text that can be encoded in UTF-8.
        add_special
            Add the tokens that the model wants around a text, such as the one for its beginning.
        parse_special
            Recognise special tokens that are written out in the text; switch it off for text
            that is not to be trusted.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, not {text!r}")
        return self._core.tokenize(text.encode(), add_special, parse_special)

    def detokenize(self, tokens: Sequence[int], *, skip_special: bool = False) -> str:
        """Return the text of ``tokens``; bytes that are no UTF-8 come out as U+FFFD."""
        return self._core.detokenize(token_ids("tokens", tokens), skip_special).decode(errors="replace")

    def token_bytes(self, token: int, *, special: bool = True) -> bytes:
        """Return the bytes of one token, often less than a character; a special one's name if asked."""
        return self._core.token_bytes(as_integer("token", token, 0, 2**31 - 1), special)

    @property
    def special_tokens(self) -> dict[str, int]:
        """The ids of the special tokens that the model has, by role: bos, eos, eot, sep, nl, pad, mask."""
        return self._core.special_tokens()

    def is_end_of_generation(self, token: int) -> bool:
        """Tell whether ``token`` ends a reply."""
        return self._core.is_end_of_generation(as_integer("token", token, 0, 2**31 - 1))

    def close(self) -> None:
        """End the open streams and free the memory. Idempotent; later use raises :class:`ClosedError`.

        Memory that arrays of logits look at stays until they are gone.
        """
        self._logits = None
        self._evaluation = None
        self._core.close()

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
        return f"<overspill.Model {self._path.name!r} {state}>"
