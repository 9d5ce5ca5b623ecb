"""A picture of a token's time, beside what the memory allows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from overspill._core import Error

__all__ = ["check_plotting", "draw_token"]


def check_plotting(file: str | os.PathLike[str]) -> None:
    """Raise the errors of :meth:`Bench.plot` before time is spent on measuring."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Error("a picture needs matplotlib: pip install 'overspill[plot]'") from None
    formats = Figure().canvas.get_supported_filetypes()
    if Path(file).suffix.removeprefix(".").lower() not in formats:
        raise ValueError(
            f"the picture must end in one of {', '.join(f'.{one}' for one in sorted(formats))}, not {file}"
        )


def draw_token(
    file: str | os.PathLike[str], title: str, floors: Mapping[str, float], parts: Mapping[str, float]
) -> None:
    """Draw two bars into a file: the least time of a token, by device, and the measured one, by part.

    Parameters
    ----------
    file
        A PNG, SVG or PDF file; :func:`check_plotting` says what is refused.
    title
        Above the bars.
    floors
        Seconds that each device needs at least, to read its memory.
    parts
        Seconds of a token by what they go to, as :attr:`Bench.parts` has them.
    """
    check_plotting(file)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    # Reading in full colour, what a device does beyond that in the same colour, hatched.
    colours = dict(zip(floors, ("#d98a29", "#2f9e63", "#2b8cbe", "#8856a7"), strict=False))
    rest = ("moving between devices", "starting the graph, fetching logits", "sampler", "text", "the rest")
    greys = dict(zip(rest, ("#c0392b", "#e6a39b", "#5b6770", "#8f9aa3", "#c4ccd2"), strict=True))
    allowed_ms, measured_ms = 0.0, 0.0
    for device, seconds in floors.items():
        axes.barh("allowed", seconds * 1e3, left=allowed_ms, color=colours.get(device, "#777777"))
        allowed_ms += seconds * 1e3
    for name, seconds in parts.items():
        place = next((device for device in floors if f" {device}" in name), None)
        beyond = name.startswith("computing")
        axes.barh(
            "measured",
            seconds * 1e3,
            left=measured_ms,
            color=greys[name] if place is None else colours.get(place, "#777777"),
            alpha=0.55 if beyond else 1.0,
            hatch="///" if beyond else None,
            edgecolor="white",
            linewidth=0,
            label=f"{name}: {seconds * 1e3:.3g} ms" if seconds >= 5e-8 else None,
        )
        measured_ms += seconds * 1e3
    axes.axvline(allowed_ms, color="#222222", linestyle="--", linewidth=1)
    axes.set_xlabel("milliseconds a token")
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(file, dpi=150)
