"""The models of a comparison, and their answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from overspill.base.checks import shown
from overspill.base.text import short_repr
from overspill.base.values import MemoryUse, Stats
from overspill.header.info import ModelInfo
from overspill.machine.hardware import Hardware
from overspill.placement.placement import Placement
from overspill.planning.forecast import Forecast
from overspill.planning.offload import Offload
from overspill.sampling.options import SamplingOptions

__all__ = ["NO_CHAT", "Answer", "ComparedModel"]


@dataclass
class Answer:
    """A model's answer to a question, so far."""

    question: str
    text: str = ""
    reasoning: str = ""
    """The reasoning before the answer, if the chat template tells it apart."""
    stats: Stats | None = None
    """None before the first token."""
    problem: str = ""
    """Why there is no answer, or only a part of it."""

    def __repr__(self) -> str:
        """Return question, answer and stats, or their beginnings, in brackets."""
        outcome = f"{shown(self.text)}: {self.stats or self.problem or 'not yet'}"
        return short_repr(self, f"{self.question[:40]!r}, {outcome}")


@dataclass
class ComparedModel:
    """One of the models: its placement, speed, memory and answers."""

    label: str
    """The file's name, and what tells it apart from another file of that name."""
    path: Path
    info: ModelInfo
    offload: Offload
    hardware: Hardware
    """The devices as they are before any of the models is loaded."""
    placement: Placement
    """The planned placement; once the model is loaded, the one in llama.cpp."""
    forecast: Forecast
    """The forecast for the model alone; its speed counts only where the hardware was measured."""
    answers: list[Answer]
    """One for each question."""
    memory: dict[str, MemoryUse] = field(default_factory=dict)
    """Bytes on each device; empty until the model is loaded."""
    n_ctx: int | None = None
    chats: bool | None = None
    """Whether it has a chat template; without one it continues the question. None until it is loaded."""
    sampling: SamplingOptions | None = None
    """Sampling options: the file's recommendation, and the given ones in place of it. None until it is loaded."""
    load_s: float | None = None
    problem: str = ""
    """Why it could not be loaded."""

    def __repr__(self) -> str:
        """Return label, placement and speed in brackets."""
        speed = "–" if self.tokens_per_second is None else f"{self.tokens_per_second:.2f}"
        return short_repr(self, f"{self.label}: {self.problem or f'{speed} tok/s'}, {self.placement!r}")

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed over all answers; None before the second token."""
        stats = [answer.stats for answer in self.answers if answer.stats is not None and answer.stats.tokens > 1]
        seconds = sum(one.decode_s for one in stats)
        return sum(one.tokens - 1 for one in stats) / seconds if seconds > 0 else None

    @property
    def time_to_first_token_s(self) -> float | None:
        """Mean seconds to the first token over all answers; None before the first token."""
        found = [answer.stats.time_to_first_token_s for answer in self.answers if answer.stats is not None]
        times = [seconds for seconds in found if seconds is not None]
        return sum(times) / len(times) if times else None


NO_CHAT = "no chat template: it continues the text"
