"""Models that are compared, and their answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from overspill.base.values import MemoryUse, Stats
from overspill.engine.loading import Offload
from overspill.header.info import ModelInfo
from overspill.machine.hardware import Hardware
from overspill.placement.placement import Placement
from overspill.planning.forecast import Forecast
from overspill.sampling.options import SamplingOptions

__all__ = ["NO_CHAT", "Answer", "ComparedModel"]


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


NO_CHAT = "no chat template: it continues the text"
