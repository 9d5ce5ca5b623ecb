"""Take a measurement of the overspill that Python finds, and print it: ``measurements.py NAME GEMMA TINY HEADER``.

``compare.py`` runs this with the packages of two revisions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import overspill
from quantities import first_token, load, logits, sampler, stream
from quantities.measuring import Measured, Models, Quantity, measure


@dataclass(frozen=True, slots=True)
class Measurement:
    """A quantity, and how often it is measured in a process of its own."""

    title: str
    of: Callable[[Models], Quantity]
    rounds: int

    def take(self, models: Models) -> Measured:
        """Measure our side."""
        return measure(self.of(models), rounds=self.rounds, warm_up=False)


def draw(title: str, **sampling: Any) -> Measurement:
    """Return the measurement of a draw."""
    options = {**sampler.PLAIN, **sampling}
    return Measurement(
        f"a draw from {sampler.N_VOCAB:,} logits: {title}",
        lambda models: partial(sampler.draw, options, sampler.normal_logits()),
        rounds=7,
    )


# The loop's share of a token is large in the tiny model, and small in Gemma. The tiny model has one thread: of two, one
# that another program keeps from its core costs more than all that is to be seen.
tiny = partial(stream.token, n_tokens=128, n_threads=1)
gemma = partial(stream.token, n_tokens=32)
MEASUREMENTS: dict[str, Measurement] = {
    "tiny-greedy": Measurement("tiny gpt-oss: a token, greedy", lambda models: partial(tiny, models.tiny_gpt_oss), 12),
    "tiny-python": Measurement(
        "tiny gpt-oss: a token, argmax in Python",
        lambda models: partial(tiny, models.tiny_gpt_oss, sampling=stream.SAMPLINGS["argmax in Python"]),
        12,
    ),
    "gemma-greedy": Measurement("Gemma: a token, greedy", lambda models: partial(gemma, models.gemma), 4),
    "gemma-top-p": Measurement(
        "Gemma: a token, top-p 0.95",
        lambda models: partial(gemma, models.gemma, sampling=stream.SAMPLINGS["top-p 0.95"]),
        4,
    ),
    "first-token": Measurement(
        "Gemma: the first token, prompt of 256",
        lambda models: partial(first_token.first_token, models.gemma, n_prompt=256),
        3,
    ),
    "load": Measurement("Gemma: loading", lambda models: partial(load.loading, models.gemma), 3),
    "plan": Measurement(
        "gpt-oss-120b: a plan from the header, 24 GiB",
        lambda models: partial(load.planning, models.gpt_oss_120b_header, vram_gib=24),
        3,
    ),
    "draw-greedy": draw("greedy", temperature=0.0),
    "draw-temperature": draw("temperature 0.8", temperature=0.8),
    "draw-top-k": draw("top-k 40", temperature=0.8, top_k=40),
    "draw-top-p": draw("top-p 0.95", temperature=0.8, top_p=0.95),
    "logits-view": Measurement("a view of the logits", lambda models: partial(logits.view, models.tiny_gpt_oss), 3),
    "import": Measurement("import overspill", lambda models: load.importing, 1),
}


def main() -> None:
    """Print the measurement, or what this overspill lacks for it."""
    name, *files = sys.argv[1:]
    try:
        measured = MEASUREMENTS[name].take(Models(*map(Path, files)))
    except (AttributeError, ImportError, TypeError) as error:
        print(json.dumps({"missing": str(error)}))
        return
    answer = measured.ours[-1].answer
    print(json.dumps({"seconds": measured.best.ours, "answer": answer, "file": overspill.__file__}))


if __name__ == "__main__":
    main()
