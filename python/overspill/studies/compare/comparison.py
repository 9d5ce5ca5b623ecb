"""What was asked, and what the models answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

from overspill.base.units import format_bytes
from overspill.placement.device_names import memory_name
from overspill.studies.compare.answers import Answer, ComparedModel

__all__ = ["Comparison"]


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
                f" ({', '.join(f'{memory_name(d)} {format_bytes(use.total_bytes)}' for d, use in one.memory.items())})"
                if len(one.memory) > 1
                else f"{one.label} {format_bytes(use.total_bytes)} of {memory_name(device)}"
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


def _times(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"


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
