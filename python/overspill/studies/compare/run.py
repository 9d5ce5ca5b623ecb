"""The run of a comparison: models are loaded, and asked the same questions."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

from overspill._core import Error, OutOfMemoryError
from overspill.base.checks import (
    as_flag,
    as_function,
    as_integer,
    as_list,
    as_path,
    as_text,
    check_keywords,
    naming,
    shown,
)
from overspill.base.units import parse_memory
from overspill.base.values import (
    DEFAULT_CACHE_TYPE,
    DEFAULT_LOAD_MODE,
    DEFAULT_SWITCH,
    CacheType,
    Experts,
    LoadMode,
    Switch,
)
from overspill.engine.arguments import check_for_any_model
from overspill.engine.keywords import CHAT_KEYWORDS, STREAM_KEYWORDS
from overspill.engine.model import Model
from overspill.engine.reply import ChatStream
from overspill.engine.stream import Stream
from overspill.header.info import ModelInfo
from overspill.hub import resolve
from overspill.machine.devices import add_rpc_servers
from overspill.planning.offload import Offload, check_offload
from overspill.sampling.options import SAMPLING_KEYWORDS, merge
from overspill.studies.compare.answers import Answer, ComparedModel
from overspill.studies.compare.comparison import Comparison
from overspill.studies.compare.plans import plan_alone, plan_together

__all__ = ["compare"]


def compare(
    models: Sequence[str | os.PathLike[str]],
    questions: str | Sequence[str],
    *,
    system: str | None = None,
    reasoning_effort: str | None = None,
    thinking: bool = True,
    offload: Offload | Sequence[Offload] = "auto",
    rpc: Sequence[str] = (),
    n_ctx: int | None = None,
    n_batch: int | None = None,
    n_ubatch: int | None = None,
    n_threads: int | None = None,
    type_k: CacheType = DEFAULT_CACHE_TYPE,
    type_v: CacheType = DEFAULT_CACHE_TYPE,
    flash_attention: Switch = DEFAULT_SWITCH,
    experts: Experts = "auto",
    load_mode: LoadMode = DEFAULT_LOAD_MODE,
    memory: Mapping[str, int | str] | None = None,
    seed: int | None = None,
    progress: Callable[[str, float], object] | None = None,
    report: Callable[[Comparison], object] | None = None,
    **options: Any,
) -> Comparison:
    """Return several models' answers to the same questions, with their speeds, memory and placements.

    They answer one after the other, since they would compete for cores and memory. If all fit into memory at once, each
    as fast as alone, they stay loaded and answer question by question. Otherwise one model answers all questions, and
    makes room for the next.

    Parameters
    ----------
    models
        Two or more GGUF files, as :class:`overspill.Model` takes them; a file may be there twice.
    questions
        One or more. Each begins a new conversation.
    system, reasoning_effort, thinking
        The system prompt, and parameters of :meth:`overspill.Model.chat`, for models with a chat template. A model
        without one continues the question.
    offload
        As for :class:`overspill.Model`: one for all models, or a list with one for each.
    rpc, n_ctx, n_batch, n_ubatch, n_threads, type_k, type_v, flash_attention, experts, load_mode, memory
        As for :class:`overspill.Model`, for all models.
    seed
        The seed of all answers. Default: a random one, which ``settings`` keeps.
    progress
        Called with the current step, in words, and the share of it that is done, 0.0 to 1.0, while devices are measured
        and models are loaded.
    report
        Called with the :class:`Comparison` whenever it has grown, such as after every token.
    **options
        Options that :meth:`overspill.Model.stream` and :meth:`overspill.Model.chat` have in common, such as
        ``max_tokens=500`` and ``temperature=0.7``.

    Returns
    -------
    Comparison
        After Ctrl-C too, once an answer has begun. A model that cannot be loaded, or that fails, has a ``problem``, as
        long as another one answers.

    Raises
    ------
    Error
        No model could be loaded, or none answered.
    ValueError, TypeError
        An argument is out of its range, or there are too few models or questions.
    """
    check_keywords(options, STREAM_KEYWORDS & CHAT_KEYWORDS)
    check_for_any_model(options)
    for name, text in (("system", system), ("reasoning_effort", reasoning_effort)):
        if text is not None:
            as_text(name, text)
    thinking, sizes = as_flag("thinking", thinking), parse_memory(memory)
    for name, function in (("progress", progress), ("report", report)):
        if function is not None:
            as_function(name, function)
    if seed is not None:
        seed = as_integer("seed", seed, 0, 2**32 - 2)
    asked = [questions] if isinstance(questions, str) else as_list("questions", questions, "strings")
    paths = [
        as_path("models", path) if isinstance(path, bytes) else path for path in as_list("models", models, "paths")
    ]
    with naming("models"):
        files = [resolve(path) for path in paths]
    offloads: list[Any] = list(offload) if isinstance(offload, list | tuple) else [offload] * len(files)
    if len(files) < 2:
        raise ValueError(f"models must be two or more, not {len(files)}")
    if len(offloads) != len(files):
        raise ValueError(f"offload must be one for all or one for each of the {len(files)} models, not {len(offloads)}")
    _check_questions(asked)
    for one in offloads:
        check_offload(one)
    add_rpc_servers(rpc)
    show = progress or (lambda what, share: None)
    loading: dict[str, Any] = {
        "n_ctx": n_ctx,
        "n_batch": n_batch,
        "n_ubatch": n_ubatch,
        "n_threads": n_threads,
        "type_k": type_k,
        "type_v": type_v,
        "flash_attention": flash_attention,
        "experts": experts,
        "load_mode": load_mode,
    }
    # A file that is there twice is read once.
    headers = {file: ModelInfo.from_file(file) for file in dict.fromkeys(files)}
    infos = [path if isinstance(path, ModelInfo) else headers[file] for path, file in zip(paths, files, strict=True)]
    compared = [
        plan_alone(label, info, one, asked, loading, sizes, show)
        for label, info, one in zip(_labels(files, offloads), infos, offloads, strict=True)
    ]
    together = plan_together(compared, loading)
    for one, placement in zip(compared, together or (), strict=False):
        one.placement = placement
    options["seed"] = random.SystemRandom().randrange(2**32 - 1) if seed is None else seed
    chat: dict[str, Any] = {"reasoning_effort": reasoning_effort, "thinking": thinking}
    settings = {**loading, "memory": dict(memory or {}), "system": system, **chat, **options}
    comparison = Comparison(asked, compared, settings, together is not None, datetime.now().astimezone())
    run = _Run(comparison, {**loading, "memory": memory}, chat, options, show, report or (lambda comparison: None))
    groups = [comparison.models] if comparison.together else [[one] for one in comparison.models]
    try:
        for group in groups:
            run.ask(group)
    except KeyboardInterrupt:
        if not run.has_answered:
            raise
        comparison.stopped = "interrupted"
    if run.errors and not run.has_answered:
        raise run.errors[0]
    return comparison


def _check_questions(questions: Sequence[str]) -> None:
    if not questions:
        raise ValueError("questions: there are none")
    for number, question in enumerate(questions, start=1):
        if not isinstance(question, str):
            raise TypeError(f"questions must be strings, not {shown(question)}")
        as_text("questions", question)
        if not question.strip():
            raise ValueError(f"questions: number {number} is empty")


def _labels(files: Sequence[Path], offloads: Sequence[Offload]) -> list[str]:
    """Return the files' names; those that are alike get their folder, their offload or a number besides."""
    labels = [re.sub(r"-00001-of-\d{5}$", "", file.name.removesuffix(".gguf")) for file in files]
    for details in (
        [f"in {file.absolute().parent.name}" for file in files],
        [f"offload {offload}" if isinstance(offload, str | int) else "a placement" for offload in offloads],
        [f"number {number}" for number in range(1, len(files) + 1)],
    ):
        by_label: dict[str, set[str]] = {}
        for label, detail in zip(labels, details, strict=True):
            by_label.setdefault(label, set()).add(detail)
        labels = [
            f"{label}, {detail}" if len(by_label[label]) > 1 else label
            for label, detail in zip(labels, details, strict=True)
        ]
    return labels


class _Run:
    """Loads models and asks them; where one fails, the others' answers are kept."""

    def __init__(
        self,
        comparison: Comparison,
        loading: dict[str, Any],
        chat: dict[str, Any],
        options: dict[str, Any],
        show: Callable[[str, float], object],
        report: Callable[[Comparison], object],
    ) -> None:
        self._comparison, self._loading, self._chat, self._options = comparison, loading, chat, options
        self._show, self._report = show, report
        self.errors: list[Exception] = []

    @property
    def has_answered(self) -> bool:
        """Whether any answer has begun."""
        return any(answer.text or answer.reasoning for one in self._comparison.models for answer in one.answers)

    def ask(self, group: Sequence[ComparedModel], *, planned: bool = True) -> None:
        """Load these models at once, and ask them all questions in turn.

        They are loaded as planned, or planned anew; if memory turns out too small, one at a time.
        """
        with ExitStack() as stack:
            loaded = []
            for one in group:
                try:
                    loaded.append((one, stack.enter_context(self._load(one, planned))))
                except OutOfMemoryError as error:
                    if not loaded:
                        self._note(error, one)
                        continue
                    # It was expected to fit beside the others, and does not.
                    self._comparison.together = False
                    break
                except Error as error:
                    self._note(error, one)
            else:
                for number in range(len(self._comparison.questions)):
                    for one, model in loaded:
                        self._answer(one, model, one.answers[number])
                return
        for one in group:
            self.ask([one], planned=False)

    def _note(self, error: Exception, where: ComparedModel | Answer) -> None:
        # A caller's mistake is raised as long as no answer is lost.
        if isinstance(error, ValueError) and not self.has_answered:
            raise error
        self.errors.append(error)
        where.problem = str(error)
        self._report(self._comparison)

    def _load(self, one: ComparedModel, planned: bool) -> Model:
        def loading(share: float) -> None:
            self._show(f"loading {one.label}", share)

        start = time.perf_counter()
        offload = one.placement if planned and one.offload == "auto" and one.hardware.gpus else one.offload
        model = Model(one.info, offload=offload, progress=loading, **self._loading)
        one.load_s = time.perf_counter() - start
        one.memory, one.placement, one.n_ctx = model.memory, model.placement, model.n_ctx
        one.chats = model.has_chat_template
        given = {name: value for name, value in self._options.items() if name in SAMPLING_KEYWORDS}
        one.sampling = merge(model.sampling, given)
        return model

    def _answer(self, one: ComparedModel, model: Model, answer: Answer) -> None:
        self._comparison.current = (one, answer)
        self._report(self._comparison)
        try:
            stream = self._open(model, answer.question)
        except (Error, ValueError) as error:
            self._note(error, answer)
        else:
            try:
                with stream:
                    self._pull(stream, answer)
            finally:
                _take_note(stream, answer)
        finally:
            self._comparison.current = None
        self._report(self._comparison)

    def _pull(self, stream: Stream | ChatStream, answer: Answer) -> None:
        while True:
            # Only the model's errors are its problem: those of `report` are the caller's.
            try:
                token = stream.__next__()
            except StopIteration:
                return
            except Error as error:
                self._note(error, answer)
                return
            answer.text += token.text  # replaced by the whole text where it is a chat
            _take_note(stream, answer)
            self._report(self._comparison)

    def _open(self, model: Model, question: str) -> Stream | ChatStream:
        if not model.has_chat_template:
            return model.stream(question, **self._options)
        system = self._comparison.settings["system"]
        messages = [] if system is None else [{"role": "system", "content": system}]
        return model.chat([*messages, {"role": "user", "content": question}], **self._chat, **self._options)


def _take_note(stream: Stream | ChatStream, answer: Answer) -> None:
    answer.stats = stream.stats
    if isinstance(stream, ChatStream):
        # The chat's own text also has its end, which was held back as the possible beginning of a mark.
        answer.reasoning, answer.text = stream.reasoning, stream.text
