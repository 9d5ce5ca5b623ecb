"""Ask several models the same questions, one after the other, and keep what there is to compare."""

from __future__ import annotations

import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from overspill import _core
from overspill.base.units import format_bytes
from overspill.base.values import LoadMode, MemoryUse, Stats
from overspill.engine.chat import ChatStream
from overspill.engine.model import Model, Offload
from overspill.engine.stream import Stream
from overspill.header.info import ModelInfo
from overspill.hub import resolve
from overspill.machine.devices import add_rpc_server, devices
from overspill.machine.hardware import Hardware
from overspill.placement.device_names import CPU
from overspill.placement.placement import Placement
from overspill.planning.forecast import Forecast, forecast
from overspill.planning.plan import plan
from overspill.planning.tuned import tuned_options
from overspill.sampling.options import SamplingOptions, merge

__all__ = ["Answer", "ComparedModel", "Comparison", "compare"]

_SPARE_RAM_BYTES = 1 << 30  # that several models leave, as a plan does on a GPU


@dataclass
class Answer:
    """What a model answered to a question, as far as it has come."""

    question: str
    text: str = ""
    reasoning: str = ""
    """What it thought aloud before, if its chat template tells it apart."""
    stats: Stats | None = None
    """None before the first token."""
    problem: str = ""
    """Why there is no answer, or no more of it."""


@dataclass
class ComparedModel:
    """One of the models: where it lies, how fast it was, and what it answered."""

    label: str
    """The file's name, and what tells it apart from another of that name."""
    path: Path
    info: ModelInfo
    offload: Offload
    hardware: Hardware
    """What there is, before any of the models was loaded."""
    placement: Placement
    """As planned; once it is loaded, as llama.cpp has it."""
    forecast: Forecast
    """What was to be expected of it alone; its speed only where the hardware was measured."""
    answers: list[Answer]
    """One for each question."""
    memory: dict[str, MemoryUse] = field(default_factory=dict)
    """Bytes on each device, once it is loaded."""
    n_ctx: int | None = None
    chats: bool | None = None
    """Whether it has a chat template; if not, it continues the question. None until it is loaded."""
    sampling: SamplingOptions | None = None
    """What its file recommends, and what was asked for instead; None until it is loaded."""
    load_s: float | None = None
    problem: str = ""
    """Why it could not be loaded."""

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed over all answers; None before the second token of any."""
        stats = [answer.stats for answer in self.answers if answer.stats is not None and answer.stats.tokens > 1]
        seconds = sum(one.decode_s for one in stats)
        return sum(one.tokens - 1 for one in stats) / seconds if seconds > 0 else None

    @property
    def time_to_first_token_s(self) -> float | None:
        """The mean over all answers; None before the first token of any."""
        found = [answer.stats.time_to_first_token_s for answer in self.answers if answer.stats is not None]
        times = [seconds for seconds in found if seconds is not None]
        return sum(times) / len(times) if times else None


@dataclass
class Comparison:
    """Models and their answers. :func:`compare` makes it, and may be asked to report while it grows."""

    questions: list[str]
    models: list[ComparedModel]
    settings: dict[str, Any]
    """What was the same for all: the seed, the system prompt, and the other options."""
    together: bool
    """Whether all models are in memory at once; otherwise all questions go to one model, then all to the next."""
    began: datetime
    current: tuple[ComparedModel, Answer] | None = None
    """Who is answering."""
    stopped: Literal["", "interrupted"] = ""

    @property
    def problems(self) -> list[str]:
        """What went wrong, each with the model's label in front."""
        found = {f"{one.label}: {one.problem}": None for one in self.models if one.problem}
        found |= {f"{one.label}: {a.problem}": None for one in self.models for a in one.answers if a.problem}
        return list(found)

    def summary(self) -> list[str]:
        """Return in a few sentences how fast the models were, and what memory they took."""
        timed = [(one.label, speed) for one in self.models if (speed := one.tokens_per_second) is not None]
        timed.sort(key=lambda entry: -entry[1])
        sentences = []
        if len(timed) > 1:
            (first, fastest), *others = timed
            second, slower = others[0]
            if len(timed) == 2:
                ratio = fastest / slower
                speeds = f"{fastest:.2f} and {slower:.2f} tok/s"
                sentences.append(
                    f"{first} and {second} decode about equally fast: {speeds}."
                    if ratio < 1.05
                    else f"{first} decodes {_times(ratio)} times as fast as {second}: {speeds}."
                )
            else:
                rest = ", ".join(f"{label} {speed:.2f}" for label, speed in others)
                sentences.append(f"{first} decodes fastest, with {fastest:.2f} tok/s; then {rest}.")
        times = [
            (one.label, sum(stats.prefill_s + stats.decode_s for stats in found), sum(stats.tokens for stats in found))
            for one in self.models
            if (found := [answer.stats for answer in one.answers if answer.stats is not None and answer.stats.tokens])
        ]
        if times:
            took = ", ".join(f"{label} {seconds:.1f} s for {tokens} tokens" for label, seconds, tokens in times)
            sentences.append(f"Answering took {took}.")
        loaded = [one for one in self.models if one.memory]
        if loaded:
            uses = "; ".join(
                f"{one.label} {format_bytes(sum(use.total_bytes for use in one.memory.values()))}"
                f" ({', '.join(f'{_place(d)} {format_bytes(use.total_bytes)}' for d, use in one.memory.items())})"
                if len(one.memory) > 1
                else f"{one.label} {format_bytes(use.total_bytes)} of {_place(device)}"
                for one in loaded
                for device, use in list(one.memory.items())[:1]
            )
            sentences.append(f"Memory: {uses}.")
        if self.stopped:
            sentences.append("It was interrupted: not every answer is there, or whole.")
        return sentences

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {
            "questions": self.questions,
            "settings": {name: _plain(value) for name, value in self.settings.items()},
            "together": self.together,
            "began": self.began.isoformat(timespec="seconds"),
            "stopped": self.stopped,
            "models": [
                {
                    "label": one.label,
                    "path": str(one.path),
                    "n_ctx": one.n_ctx,
                    "chats": one.chats,
                    "sampling": None if one.sampling is None else asdict(one.sampling),
                    "load_s": one.load_s,
                    "problem": one.problem,
                    "tokens_per_second": one.tokens_per_second,
                    "time_to_first_token_s": one.time_to_first_token_s,
                    "memory": {device: asdict(use) for device, use in one.memory.items()},
                    "forecast": one.forecast.to_dict(),
                    "hardware": one.hardware.to_dict(),
                    "placement": one.placement.to_dict(),
                    "answers": [_answer_to_dict(answer) for answer in one.answers],
                }
                for one in self.models
            ],
        }

    def to_html(self) -> str:
        """Return one page that shows it, with nothing to be loaded from elsewhere.

        What models wrote is rendered from Markdown; HTML in it is shown as text, and images are links.
        """
        from overspill.studies.compare.report import (
            html_report,  # what it needs would slow down every import of overspill
        )

        return html_report(self)


def _times(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"


def _place(device: str) -> str:
    return "RAM" if device == CPU else device


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, str | int | float) else repr(value)


def _answer_to_dict(answer: Answer) -> dict[str, Any]:
    data = asdict(answer)
    if answer.stats is not None:
        data["stats"]["tokens_per_second"] = answer.stats.tokens_per_second
    return data


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
    n_batch: int = 512,
    n_threads: int | None = None,
    load_mode: LoadMode = "mmap",
    memory: Mapping[str, int | str] | None = None,
    seed: int | None = None,
    progress: Callable[[str, float], object] | None = None,
    report: Callable[[Comparison], object] | None = None,
    **options: Any,
) -> Comparison:
    """Ask several models the same questions; return their answers, speeds, memory and placements.

    They answer one after the other, since they would compete for the same cores and memory. If they all fit into
    memory at once as they would alone, they stay loaded, and answer question by question; otherwise the first answers
    all questions and makes room for the next.

    Parameters
    ----------
    models
        Two or more GGUF files, as :class:`overspill.Model` takes them. The same one may come again.
    questions
        One or more. Each begins anew, without what was asked before.
    system, reasoning_effort, thinking
        The system prompt, and what :meth:`overspill.Model.chat` takes of these names, for models with a chat template.
        The others continue the question.
    offload
        As of :class:`overspill.Model`: one for all, or a list with one for each.
    rpc, n_ctx, n_batch, n_threads, load_mode, memory
        As of :class:`overspill.Model`, for all.
    seed
        The same for all. Default: one that is drawn, and kept in ``settings``.
    progress
        Called with what is being done and the share that is done, 0.0 to 1.0, while devices are measured and models
        loaded.
    report
        Called with the :class:`Comparison` whenever there is more of it: after every token, for example.
    **options
        As of :meth:`overspill.Model.stream`, also for chats, such as ``max_tokens=500`` and ``temperature=0.7``.

    Returns
    -------
    Comparison
        Also after Ctrl-C, once there is something of an answer; and where a model cannot be loaded or fails, as long
        as another one answers: its ``problem`` says why.

    Raises
    ------
    Error
        No model could be loaded, or none answered.
    ValueError, TypeError
        An argument is out of its range, or there are too few models or questions.
    """
    asked = [questions] if isinstance(questions, str) else list(questions)
    files = [resolve(path) if isinstance(path, str) else Path(path) for path in _listed("models", models)]
    offloads: list[Any] = list(offload) if isinstance(offload, list | tuple) else [offload] * len(files)
    if len(files) < 2:
        raise ValueError(f"models must be two or more, not {len(files)}")
    if len(offloads) != len(files):
        raise ValueError(f"offload must be one for all or one for each of the {len(files)} models, not {len(offloads)}")
    _check_questions(asked)
    for endpoint in rpc:
        add_rpc_server(endpoint)
    show = progress or (lambda what, share: None)
    plan_settings = {"n_ctx": n_ctx, "n_ubatch": n_batch, "load_mode": load_mode}
    headers = [ModelInfo.from_file(file) for file in files]
    compared = [
        _examine(label, info, one, asked, plan_settings, memory or {}, n_threads, show)
        for label, info, one in zip(_labels(files, offloads), headers, offloads, strict=True)
    ]
    together = plan_together(compared, plan_settings)
    for one, placement in zip(compared, together or (), strict=False):
        one.placement = placement
    options["seed"] = random.SystemRandom().randrange(2**32 - 1) if seed is None else seed
    loading: dict[str, Any] = {"n_ctx": n_ctx, "n_batch": n_batch, "n_threads": n_threads, "load_mode": load_mode}
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


def _listed(name: str, values: Sequence[Any]) -> list[Any]:
    if isinstance(values, str | os.PathLike):
        raise TypeError(f"{name} must be a sequence, not {values!r}")
    return list(values)


def _check_questions(questions: Sequence[str]) -> None:
    if not questions:
        raise ValueError("questions: there are none")
    for number, question in enumerate(questions, start=1):
        if not isinstance(question, str):
            raise TypeError(f"questions must be strings, not {question!r}")
        if not question.strip():
            raise ValueError(f"questions: number {number} is empty")


def _labels(files: Sequence[Path], offloads: Sequence[Offload]) -> list[str]:
    """Return the files' names, and for those that are alike what tells them apart."""
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


def _examine(
    label: str,
    info: ModelInfo,
    offload: Offload,
    questions: Sequence[str],
    settings: Mapping[str, Any],
    memory: Mapping[str, int | str],
    n_threads: int | None,
    show: Callable[[str, float], object],
) -> ComparedModel:
    """Plan for a model that has all memory to itself."""
    # Measured only where something depends on it, as when a model is loaded.
    hardware = Hardware.here(
        info,
        memory=memory,
        n_threads=n_threads,
        measure=offload != "cpu" and any(device.is_gpu for device in devices()),
        progress=lambda what, share: show(f"measuring {what}", share),
    )
    placement, expected = _plan(info, offload, hardware, settings)
    answers = [Answer(question) for question in questions]
    return ComparedModel(label, Path(info.files[0]), info, offload, hardware, placement, expected, answers)


def _plan(
    info: ModelInfo, offload: Offload, hardware: Hardware, settings: Mapping[str, Any]
) -> tuple[Placement, Forecast]:
    if offload == "auto":
        planned = plan(info, hardware=hardware, **settings)
        return planned, planned.forecast()
    if offload == "tuned":
        tuned = tuned_options(info)
        offload = tuned["offload"]
        n_ctx = settings["n_ctx"]
        settings = {name: tuned[name] for name in ("n_ctx", "n_ubatch", "type_k", "type_v", "load_mode")}
        settings |= {} if n_ctx is None else {"n_ctx": n_ctx}
    if isinstance(offload, Placement):
        placement = offload
    elif not hardware.gpus and isinstance(offload, str | int):
        placement = Placement.cpu(info)  # if it is not what was asked for, loading says so
    else:
        placement = Placement.from_offload(info, hardware.gpus, offload)
    return placement, forecast(info, placement, hardware, **settings)


def plan_together(models: Sequence[ComparedModel], settings: Mapping[str, Any]) -> list[Placement] | None:
    """Plan each model with what those before it leave; return None if one does not fit then, or is slower."""
    taken = Counter({CPU: _SPARE_RAM_BYTES})
    placements = []
    for one in models:
        placement, expected = _plan(one.info, one.offload, one.hardware.without(taken), settings)
        if expected.verdict == "does not fit" or expected.tokens_per_s < 0.99 * one.forecast.tokens_per_s:
            return None
        placements.append(placement)
        for device, use in expected.memory.items():
            taken[device] += use.total_bytes
    return placements


class _Run:
    """Loads models and asks them; whatever one of them cannot do, the others' answers are kept."""

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
        """Whether there is something of an answer."""
        return any(answer.text or answer.reasoning for one in self._comparison.models for answer in one.answers)

    def ask(self, group: Sequence[ComparedModel], *, planned: bool = True) -> None:
        """Load these models at once, as planned or planned anew, and ask them all questions, one after the other."""
        with ExitStack() as stack:
            loaded = []
            for one in group:
                try:
                    loaded.append((one, stack.enter_context(self._load(one, planned))))
                except _core.OutOfMemoryError as error:
                    if not loaded:
                        self._note(error, one)
                        continue
                    # It was expected to fit beside the others, and does not.
                    self._comparison.together = False
                    break
                except _core.Error as error:
                    self._note(error, one)
            else:
                for number in range(len(self._comparison.questions)):
                    for one, model in loaded:
                        self._answer(one, model, one.answers[number])
                return
        for one in group:
            self.ask([one], planned=False)

    def _note(self, error: Exception, where: ComparedModel | Answer) -> None:
        # A caller's mistake is raised as long as that loses nothing.
        if isinstance(error, ValueError | TypeError) and not self.has_answered:
            raise error
        self.errors.append(error)
        where.problem = str(error)
        self._report(self._comparison)

    def _load(self, one: ComparedModel, planned: bool) -> Model:
        def loading(share: float) -> None:
            self._show(f"loading {one.label}", share)

        start = time.perf_counter()
        offload = one.placement if planned and one.offload == "auto" and one.hardware.gpus else one.offload
        model = Model(one.path, offload=offload, progress=loading, **self._loading)
        one.load_s = time.perf_counter() - start
        one.memory, one.placement, one.n_ctx = model.memory, model.placement, model.n_ctx
        one.chats = model.has_chat_template
        known = {option.name for option in fields(SamplingOptions)}
        one.sampling = merge(model.sampling, {name: value for name, value in self._options.items() if name in known})
        return model

    def _answer(self, one: ComparedModel, model: Model, answer: Answer) -> None:
        self._comparison.current = (one, answer)
        self._report(self._comparison)
        try:
            stream = self._open(model, answer.question)
        except (_core.Error, ValueError, TypeError) as error:
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
            # Only what the model raises is its problem: what `report` raises is the caller's.
            try:
                token = stream.__next__()
            except StopIteration:
                return
            except _core.Error as error:
                self._note(error, answer)
                return
            answer.text += token.text  # of a chat, what it is part of is noted instead
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
        # At the end of it is what was held back as the possible beginning of a mark.
        answer.reasoning, answer.text = stream.reasoning, stream.text
