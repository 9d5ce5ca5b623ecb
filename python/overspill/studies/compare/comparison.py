"""A comparison of models: questions, answers, and a summary, JSON and a page of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

from overspill.base import html
from overspill.base.text import short_repr
from overspill.base.units import format_bytes, format_count
from overspill.placement.device_names import memory_name
from overspill.studies.compare.answers import Answer, ComparedModel
from overspill.studies.compare.bars import speed_bars

__all__ = ["Comparison"]


@dataclass
class Comparison:
    """Models and their answers to the same questions; :func:`compare` returns it, and reports it while it grows."""

    questions: list[str]
    models: list[ComparedModel]
    settings: dict[str, Any]
    """The settings of all models: the seed, the system prompt, and the other options."""
    together: bool
    """Whether all models are in memory at once; otherwise each in turn is loaded, and answers all questions."""
    began: datetime
    current: tuple[ComparedModel, Answer] | None = None
    """The model that is answering, and its answer; None between answers."""
    stopped: Literal["", "interrupted"] = ""

    @property
    def problems(self) -> list[str]:
        """Problems of models and answers, each with the model's label in front."""
        found = {f"{one.label}: {one.problem}": None for one in self.models if one.problem}
        found |= {f"{one.label}: {a.problem}": None for one in self.models for a in one.answers if a.problem}
        return list(found)

    def summary(self) -> list[str]:
        """Return a few sentences on the models' speed and memory."""
        sentences = [*_speed_sentences(self.models), *_time_sentences(self.models), *_memory_sentences(self.models)]
        if self.stopped:
            sentences.append("It was interrupted: not every answer is there, or whole.")
        return sentences

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as values for JSON."""
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
        """Return the comparison as an HTML page that loads nothing from elsewhere.

        The models' Markdown is rendered. HTML in it is shown as text, and images become links.
        """
        from overspill.studies.compare.page import html_page  # its libraries would slow down every import of overspill

        return html_page(
            self.questions,
            self.models,
            self.settings,
            together=self.together,
            began=self.began,
            sentences=self.summary(),
            problems=self.problems,
        )

    def __repr__(self) -> str:
        """Return the models with their speeds, and the number of questions, in brackets."""
        speeds = ", ".join(f"{bar.label} {bar.value}" for bar in speed_bars(self.models))
        return short_repr(self, f"{format_count(len(self.questions), 'question')}: {speeds}")

    def _repr_html_(self) -> str:
        """Return a table of the models, one of their answers, and the summary, for a notebook."""
        names = ("model", "speed", "first token", "quantization", "size", "memory")
        models = ["".join(map(html.heading, names))]
        for one, speed in zip(self.models, speed_bars(self.models), strict=True):
            first = one.time_to_first_token_s
            memory = sum(use.total_bytes for use in one.memory.values())
            facts = (
                "–" if first is None else f"{first:.2f} s",
                one.info.quantisation,
                format_bytes(one.info.file_bytes),
                format_bytes(memory) if memory else "–",
            )
            bar = html.bar([html.Segment("", share, _SPEED) for share, *_ in speed.shares], width="8em")
            cells = [html.cell(html.escape(speed.value) + bar), *(html.cell(html.escape(fact)) for fact in facts)]
            models.append(html.heading(one.label) + "".join(cells))
        answers = ["".join(map(html.heading, ("question", *(one.label for one in self.models))))]
        for number, question in enumerate(self.questions):
            said = (one.answers[number] for one in self.models)
            cells = [html.cell(html.passage(answer.text.strip() or answer.problem)) for answer in said]
            answers.append(html.heading(question) + "".join(cells))
        return html.table(models) + html.table(answers) + html.lines([*self.summary(), *self.problems])


_SPEED = "#b5d4f4"


def _speed_sentences(models: Sequence[ComparedModel]) -> Iterator[str]:
    timed = [(one.label, speed) for one in models if (speed := one.tokens_per_second) is not None]
    timed.sort(key=lambda entry: -entry[1])
    if len(timed) < 2:
        return
    (first, fastest), *others = timed
    if len(others) > 1:
        rest = ", ".join(f"{label} {speed:.2f}" for label, speed in others)
        yield f"{first} decodes fastest, with {fastest:.2f} tok/s; then {rest}."
        return
    second, slower = others[0]
    ratio = fastest / slower
    speeds = f"{fastest:.2f} and {slower:.2f} tok/s"
    if ratio < 1.05:
        yield f"{first} and {second} decode about equally fast: {speeds}."
    else:
        yield f"{first} decodes {ratio:.{0 if ratio >= 10 else 1}f} times as fast as {second}: {speeds}."


def _time_sentences(models: Sequence[ComparedModel]) -> Iterator[str]:
    times = [
        (one.label, sum(stats.prefill_s + stats.decode_s for stats in found), sum(stats.tokens for stats in found))
        for one in models
        if (found := [answer.stats for answer in one.answers if answer.stats is not None and answer.stats.tokens])
    ]
    if times:
        took = ", ".join(f"{label} {seconds:.1f} s for {tokens} tokens" for label, seconds, tokens in times)
        yield f"Answering took {took}."


def _memory_sentences(models: Sequence[ComparedModel]) -> Iterator[str]:
    uses = []
    for one in models:
        bytes_by_memory = {memory_name(device): use.total_bytes for device, use in one.memory.items()}
        if len(bytes_by_memory) > 1:
            parts = ", ".join(f"{name} {format_bytes(n_bytes)}" for name, n_bytes in bytes_by_memory.items())
            uses.append(f"{one.label} {format_bytes(sum(bytes_by_memory.values()))} ({parts})")
        else:
            uses += [f"{one.label} {format_bytes(n_bytes)} of {name}" for name, n_bytes in bytes_by_memory.items()]
    if uses:
        yield f"Memory: {'; '.join(uses)}."


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
