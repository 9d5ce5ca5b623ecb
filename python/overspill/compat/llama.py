"""The class Llama(ByHand): llama-cpp-python's names for what :class:`overspill.Model` does."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from overspill._core import ContextFullError
from overspill.base.checks import as_flag, as_integer, as_text, check_keywords, keywords_of, shown
from overspill.base.text import short_repr
from overspill.compat.by_hand import ByHand, until_met
from overspill.compat.call_arguments import (
    Criteria,
    Criterion,
    LlamaGrammar,
    Processor,
    Seeds,
    schema_of,
    stream_options,
    tools_and_choice,
)
from overspill.compat.load_arguments import check_only_defaults, header_of, hub_name, model_keywords
from overspill.engine.model import LOAD_KEYWORDS, Model
from overspill.engine.reply import ChatStream
from overspill.engine.stream import Stream
from overspill.engine.template import Message
from overspill.engine.tools import Tool
from overspill.server.replies import ChatReplies, Event, Outcome, Replies, TextReplies

__all__ = ["Llama"]

Answer: TypeAlias = dict[str, Any] | Iterator[dict[str, Any]]
"""A whole answer in the form of OpenAI's API, or with ``stream=True`` its chunks."""

# Names of chat formats, and a text that is in the templates of models which have it.
_FORMATS = {
    "chatml": "<|im_start|>",
    "chatml-function-calling": "<|im_start|>",
    "qwen": "<|im_start|>",
    "llama-2": "[INST]",
    "llama-3": "<|start_header_id|>",
    "mistral-instruct": "[INST]",
    "gemma": "<start_of_turn>",
    "zephyr": "<|user|>",
    "chat_template.default": "",
}
_ABSENT = {
    "create_embedding": "Overspill makes no embeddings",
    "ctx": "the context is not at hand; llm.model is the overspill.Model",
    "embed": "Overspill makes no embeddings",
    "load_state": "a state is read from a file: llm.model.load_state(path)",
    "pooling_type": "Overspill makes no embeddings",
    "save_state": "a state is saved to a file: llm.model.save_state(path)",
    "tokenizer": "tokenize() and detokenize() are the tokenizer",
}


class Llama(ByHand):
    """A model with the constructor and the methods of ``llama_cpp.Llama``.

    Answers are dictionaries in the form of OpenAI's API. A context that is too small for a prompt is a ValueError, as
    there. Prompts that begin as an earlier one did are not read again from the start.

    Parameters
    ----------
    model_path
        The GGUF file, or a name that :func:`overspill.hub.resolve` knows.
    n_gpu_layers
        The last layers that go to the GPU, at least 0; -1, and more than the model has, stand for ``offload="auto"``:
        all of them if they fit, otherwise what is fastest.
    n_ctx
        Tokens of prompt and reply together; 0 for as many as the model was trained for.
    n_batch, n_ubatch
        Tokens of a prompt in one batch, at most ``n_ctx``, and of these that are computed at once; 512 and 512 are left
        to the plan.
    n_threads, n_threads_batch
        CPU threads, 1 to 512; None and 0 for the physical cores. The second one must be the same, or None.
    vocab_only
        Load the vocabulary alone.
    use_mmap, use_mlock
        Whether the file is mapped, and kept from being swapped out.
    kv_overrides
        Values of the header in place of the file's, by key.
    rope_freq_base, rope_freq_scale
        The same for RoPE's base and the inverse of its scaling factor; 0.0 for the file's.
    seed
        Where calls without a seed take theirs from, 0 to 4294967294; 4294967295 and -1: by chance.
    logits_all
        Whether :attr:`scores` has the logits after every token of :meth:`eval`, and not after the last one alone.
        Answers have log-probabilities in both cases.
    flash_attn
        True for flash attention on every device; False leaves it to the devices.
    type_k, type_v
        The types of the KV cache by ggml's number, such as 8 for q8_0; None for f16.
    op_offload
        False leaves all batches with weights in RAM to the CPU.
    last_n_tokens_size
        Tokens that the penalties look at, at least 0; -1 for all.
    chat_format
        None, or the name of the format that the file's template has.
    verbose, no_perf
        No effect: llama.cpp's log goes to ``logging.getLogger("overspill.llama")``, and times are always taken.
    split_mode, main_gpu, tensor_split, rope_scaling_type, pooling_type, attention_type, yarn_ext_factor, \
yarn_attn_factor, yarn_beta_fast, yarn_beta_slow, yarn_orig_ctx, embedding, offload_kqv, swa_full, lora_base, \
lora_scale, lora_path, numa, chat_handler, draft_model, tokenizer, spm_infill
        The default alone; the error for any other value says what to do instead.
    **settings
        Arguments of :class:`overspill.Model` that llama-cpp-python has not, such as ``memory={"CUDA0": "6GiB"}``; they
        go before the ones above.

    Raises
    ------
    ValueError, TypeError
        The file does not exist, or an argument has another value than those above. The message names the argument.
    ModelLoadError, OutOfMemoryError, Error
        As for :class:`overspill.Model`.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        n_gpu_layers: int = 0,
        split_mode: int = 1,
        main_gpu: int = 0,
        tensor_split: None = None,
        vocab_only: bool = False,
        use_mmap: bool = True,
        use_mlock: bool = False,
        kv_overrides: Mapping[str, bool | int | float | str] | None = None,
        seed: int = 2**32 - 1,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        rope_scaling_type: int | None = -1,
        pooling_type: int = -1,
        attention_type: int = -1,
        rope_freq_base: float = 0.0,
        rope_freq_scale: float = 0.0,
        yarn_ext_factor: float = -1.0,
        yarn_attn_factor: float = 1.0,
        yarn_beta_fast: float = 32.0,
        yarn_beta_slow: float = 1.0,
        yarn_orig_ctx: int = 0,
        logits_all: bool = False,
        embedding: bool = False,
        offload_kqv: bool = True,
        flash_attn: bool = False,
        op_offload: bool | None = None,
        swa_full: bool | None = None,
        no_perf: bool = False,
        last_n_tokens_size: int = 64,
        lora_base: None = None,
        lora_scale: float = 1.0,
        lora_path: None = None,
        numa: bool | int = False,
        chat_format: str | None = None,
        chat_handler: None = None,
        draft_model: None = None,
        tokenizer: None = None,
        type_k: int | None = None,
        type_v: int | None = None,
        spm_infill: bool = False,
        verbose: bool = True,
        **settings: Any,
    ) -> None:
        """Load the model."""
        given = dict(locals())
        check_keywords(settings, LOAD_KEYWORDS | keywords_of(Llama.__init__))
        check_only_defaults(given)
        as_flag("no_perf", no_perf)
        self.verbose = as_flag("verbose", verbose)
        """As it was given."""
        all_rows = as_flag("logits_all", logits_all)
        last_n = as_integer("last_n_tokens_size", last_n_tokens_size, -1, 2**31 - 1)
        seeds = Seeds(seed)
        self.chat_format = None if chat_format is None else as_text("chat_format", chat_format)
        """As it was given."""
        info = header_of(given)
        super().__init__(Model(info, **{**model_keywords(given, info), **settings}), seeds, last_n, all_rows)
        self.model_path = os.fspath(model_path)
        """As it was given."""
        try:
            self._check_chat_format()
        except BaseException:
            self.close()
            raise

    def _check_chat_format(self) -> None:
        if self.chat_format is None:
            return
        if self.chat_format not in _FORMATS:
            raise ValueError(f"chat_format must be None or one of {', '.join(_FORMATS)}, not {shown(self.chat_format)}")
        source = self.model.chat_template.source if self.model.has_chat_template else ""
        if not source or _FORMATS[self.chat_format] not in source:
            raise ValueError(
                f"chat_format: the file's template is not {self.chat_format}: leave it out to use that, or give "
                "another one, llm.model.chat_template = overspill.ChatTemplate(llm.model, source)"
            )

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str | None,
        additional_files: None = None,
        local_dir: None = None,
        local_dir_use_symlinks: bool | str = "auto",
        cache_dir: None = None,
        **options: Any,
    ) -> Llama:
        """Return a model of the Hugging Face hub, which is downloaded if it is not in the hub's cache.

        Parameters
        ----------
        repo_id
            The repository, ``OWNER/NAME``.
        filename
            A file of it, of a split model the first; a pattern that names the quantisation, such as ``*Q4_K_M.gguf``;
            or None for the quantisation that suits this machine's memory best.
        additional_files, local_dir, local_dir_use_symlinks, cache_dir
            The default alone: all parts of a split model are downloaded, to the hub's own cache.
        **options
            Arguments of :class:`Llama`.

        Raises
        ------
        Error, ValueError, TypeError
            As for :func:`overspill.hub.resolve` and :class:`Llama`.
        """
        check_only_defaults(locals())
        check_keywords(options, LOAD_KEYWORDS | keywords_of(Llama.__init__))
        return cls(hub_name(repo_id, filename), **options)

    # --- answers

    def create_completion(
        self,
        prompt: str | Sequence[int],
        suffix: str | None = None,
        max_tokens: int | None = 16,
        temperature: float = 0.8,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        logprobs: int | None = None,
        echo: bool = False,
        stop: str | Sequence[str] | None = (),
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        top_k: int = 40,
        stream: bool = False,
        seed: int | None = None,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        stopping_criteria: Sequence[Criterion] | None = None,
        logits_processor: Sequence[Processor] | None = None,
        grammar: LlamaGrammar | None = None,
        logit_bias: Mapping[int, float] | Mapping[str, float] | None = None,
    ) -> Answer:
        """Return the continuation of a text; ``llm(prompt, ...)`` is the same.

        Parameters
        ----------
        prompt
            A text, in which special tokens are recognised, or token ids, which are taken as they are.
        max_tokens
            The most tokens of the continuation; None, 0 and less for no limit but the context.
        logprobs
            The number of likeliest tokens, 0 to 1000, whose log-probabilities the answer has for each token.
        echo
            Whether the answer begins with the prompt; not together with ``logprobs``.
        stop, temperature, top_k, top_p, min_p, typical_p, repeat_penalty, frequency_penalty, presence_penalty, \
mirostat_tau, mirostat_eta, logit_bias
            As for :meth:`overspill.Model.stream`; a ``top_k`` under 0 keeps all, and keys of ``logit_bias`` may be
            strings.
        mirostat_mode
            0 for off, or 2.
        stream
            Whether to return an iterator of chunks.
        seed
            0 to 4294967294; -1 and 4294967295 for one by chance, None for the next of the model's.
        model
            The name that the answer has. Default: ``model_path``.
        stopping_criteria
            Functions ``f(input_ids, logits)`` that end the reply by returning True.
        logits_processor
            Functions ``f(input_ids, scores)`` that return the logits to use.
        grammar
            A grammar that the continuation cannot leave.
        suffix, tfs_z
            The default alone.

        Raises
        ------
        ValueError, TypeError
            The prompt does not fit into the context, or an argument has another value than those above.
        ClosedError, UnusableError, Error
            As for :meth:`overspill.Model.stream`.
        """
        given = locals()
        check_only_defaults(given)
        name = self.model_path if model is None else as_text("model", model)
        is_streamed, is_echoed = as_flag("stream", stream), as_flag("echo", echo)
        tokens = self._tokens(prompt)
        criteria = Criteria(stopping_criteria)
        options = stream_options(given, criteria, self._last_n, self._seeds.next(seed))
        if logprobs is not None:
            options["logprobs"] = as_integer("logprobs", logprobs, 0, 1000) or True
            if is_echoed:
                raise ValueError(
                    "echo must be False with logprobs here: llm.model.eval(tokens, logits='all') measures a prompt"
                )
        text = (prompt if isinstance(prompt, str) else self.model.detokenize(tokens)) if is_echoed else ""
        replies = TextReplies(name, self.model.token_bytes, 1, [text])
        opened = self.model.stream(tokens, reuse=True, **options)
        return _answer(replies, opened, criteria, name, is_streamed, _add_chosen_tokens)

    __call__ = create_completion

    def create_chat_completion(
        self,
        messages: Sequence[Message],
        functions: Sequence[Tool] | None = None,
        function_call: str | Mapping[str, Any] | None = None,
        tools: Sequence[Tool] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        temperature: float = 0.2,
        top_p: float = 0.95,
        top_k: int = 40,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        stream: bool = False,
        stop: str | Sequence[str] | None = (),
        seed: int | None = None,
        response_format: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        logits_processor: Sequence[Processor] | None = None,
        grammar: LlamaGrammar | None = None,
        logit_bias: Mapping[int, float] | Mapping[str, float] | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
    ) -> Answer:
        """Return the reply to a conversation.

        Parameters
        ----------
        messages
            As for :meth:`overspill.Model.chat`.
        tools, tool_choice
            Tools that the model may ask for, and ``"auto"``, ``"none"``, ``"required"`` or the one that it has to call,
            ``{"type": "function", "function": {"name": "..."}}``.
        functions, function_call
            The same in the older form; the answer has ``function_call`` besides ``tool_calls`` then.
        response_format
            ``{"type": "json_object", "schema": {...}}`` for JSON that fits a schema, which may be left out;
            ``{"type": "json_schema", "json_schema": {"schema": {...}}}`` likewise; ``{"type": "text"}`` for any text.
        max_tokens
            The most tokens of the reply; None, 0 and less for no limit but the context.
        logprobs, top_logprobs
            Whether the answer has the log-probabilities of its tokens, and of how many others for each, 0 to 1000.
        temperature, top_p, top_k, min_p, typical_p, stream, stop, seed, presence_penalty, frequency_penalty, \
repeat_penalty, tfs_z, mirostat_mode, mirostat_tau, mirostat_eta, model, logits_processor, grammar, logit_bias
            As for :meth:`create_completion`.

        Raises
        ------
        ValueError, TypeError
            The conversation does not fit into the context, or an argument has another value than those above.
        Error
            The file has no chat template, or as for :meth:`overspill.Model.chat`.
        """
        given = locals()
        check_only_defaults(given)
        name = self.model_path if model is None else as_text("model", model)
        is_streamed = as_flag("stream", stream)
        criteria = Criteria(None)
        options = stream_options(given, criteria, self._last_n, self._seeds.next(seed))
        n_others = 0 if top_logprobs is None else as_integer("top_logprobs", top_logprobs, 0, 1000)
        if logprobs is not None and as_flag("logprobs", logprobs):
            options["logprobs"] = n_others or True
        options["tools"], options["tool_choice"] = tools_and_choice(given)
        replies = ChatReplies(name, self.model.token_bytes, 1)
        try:
            opened = self.model.chat(messages, json_schema=schema_of(response_format), **options)
        except ContextFullError as error:
            raise ValueError(f"messages exceed context window, which Llama(n_ctx=...) makes larger: {error}") from None
        amend = _add_nothing if functions is None else _add_function_call
        return _answer(replies, opened, criteria, name, is_streamed, amend)

    def create_chat_completion_openai_v1(self, messages: Sequence[Message], **options: Any) -> Any:
        """Return what :meth:`create_chat_completion` does as objects of the package openai.

        Raises
        ------
        ImportError
            The package is not installed.
        """
        check_keywords(options, _CHAT_ARGUMENTS)
        try:
            from openai.types.chat import ChatCompletion, ChatCompletionChunk
        except ImportError as error:
            raise ImportError(
                "create_chat_completion_openai_v1 needs the package openai: pip install openai"
            ) from error
        answer = self.create_chat_completion(messages, **options)
        if isinstance(answer, dict):
            return ChatCompletion.model_validate(answer)
        return map(ChatCompletionChunk.model_validate, answer)

    # --- the end

    def set_cache(self, cache: object) -> None:
        """Do nothing: prompts that begin as earlier ones did are read from there on by themselves."""

    def close(self) -> None:
        """Free the memory. Idempotent."""
        self.model.close()

    def __enter__(self) -> Llama:
        """Return the model itself; it is closed when the block is left."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the model."""
        self.close()

    if not TYPE_CHECKING:  # a type checker would believe that there is everything

        def __getattr__(self, name: str) -> Any:
            """Raise an AttributeError that says what to do without a method of llama-cpp-python."""
            reason = f": {_ABSENT[name]}" if name in _ABSENT else ""
            raise AttributeError(f"Llama has no {name!r} here{reason}", name=name, obj=self)

    def __repr__(self) -> str:
        """Return the model's path in brackets."""
        return short_repr(self, shown(self.model_path))


_CHAT_ARGUMENTS = frozenset(signature(Llama.create_chat_completion).parameters) - {"self", "messages"}


def _answer(
    replies: Replies,
    stream: Stream | ChatStream,
    criteria: Criteria,
    name: str,
    is_streamed: bool,
    amend: Callable[[Event], dict[str, Any]],
) -> Answer:
    """Return the whole answer, or its chunks."""

    def chunks() -> Iterator[dict[str, Any]]:
        yield from map(amend, replies.begin())
        with stream:
            for token in until_met(stream, criteria):
                yield from map(amend, replies.add(0, token))
        yield from map(amend, replies.end(0, Outcome(stream.stats, name)))

    if is_streamed:
        return chunks()
    deque(chunks(), maxlen=0)
    return amend(replies.whole([Outcome(stream.stats, name)]))


def _add_nothing(event: Event) -> dict[str, Any]:
    return dict(event)


def _add_chosen_tokens(event: Event) -> dict[str, Any]:
    """Put the chosen tokens among the likeliest ones, where they are always found there."""
    for choice in event["choices"]:
        measured = choice["logprobs"] or {"tokens": (), "token_logprobs": (), "top_logprobs": ()}
        for token, value, others in zip(*map(measured.get, ("tokens", "token_logprobs", "top_logprobs")), strict=True):
            others.setdefault(token, value)
    return dict(event)


def _add_function_call(event: Event) -> dict[str, Any]:
    """Put the first call of a tool where the older form has it."""
    for choice in event["choices"]:
        part = choice.get("message") or choice.get("delta") or {}
        if part.get("tool_calls"):
            part["function_call"] = part["tool_calls"][0]["function"]
    return dict(event)
