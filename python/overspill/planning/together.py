"""Models beside each other: each is planned on the memory that those before it leave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

from overspill.machine.hardware import Hardware
from overspill.placement.placement import Placement
from overspill.planning.forecast import Forecast

__all__ = ["Planner", "plan_in_turn"]

Planner: TypeAlias = Callable[[Hardware], tuple[Placement, Forecast]]
"""Places a model on some hardware, and forecasts what it takes there."""


def plan_in_turn(
    models: Iterable[tuple[Hardware, Planner]], reserved_bytes: Mapping[str, int] | None = None
) -> Iterator[tuple[Placement, Forecast]]:
    """Yield each model's placement and forecast beside the models before it.

    Parameters
    ----------
    models
        Each with the hardware as it is without the others: its rates may have been measured for this model.
    reserved_bytes
        Memory by device that all models leave free. Default: none.
    """
    taken = Counter(reserved_bytes)
    for hardware, planner in models:
        placement, expected = planner(hardware.without(taken))
        yield placement, expected
        taken.update({device: use.total_bytes for device, use in expected.memory.items()})
