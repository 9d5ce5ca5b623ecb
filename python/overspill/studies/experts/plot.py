"""A picture of a trace: how often each layer uses each expert, and what caches would answer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["draw_experts"]

_COLOURS = ("#2b8cbe", "#2f9e63", "#d98a29", "#8856a7", "#222222", "#c0392b", "#5b6770")


def draw_experts(
    file: str | os.PathLike[str],
    title: str,
    layers: Sequence[int],
    used: NDArray[np.float64],
    curves: Mapping[str, Sequence[tuple[float, float]]],
) -> None:
    """Draw a heat map of layers and experts, and beside it the hits of each policy.

    Parameters
    ----------
    file
        A PNG, SVG or PDF file, which ``check_plotting`` has been asked about.
    title
        Above both.
    layers
        The numbers of the layers.
    used
        The share of tokens that use an expert, of shape (layers, experts).
    curves
        By policy, the shares of experts that are resident and of requests that are hits.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(12, 5), layout="constrained")
    figure.suptitle(title, fontsize=12)
    heat, hits = figure.subplots(1, 2, width_ratios=[1.6, 1])
    # The most used expert of all should not make the others look alike.
    most = max(float(np.quantile(used, 0.995)), 1e-9)
    image = heat.imshow(used, aspect="auto", cmap="magma", vmin=0, vmax=most, interpolation="nearest")
    heat.set_xlabel("expert")
    heat.set_ylabel("layer")
    heat.xaxis.set_major_locator(MaxNLocator(integer=True))
    step = max(1, len(layers) // 12)
    heat.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    bar = figure.colorbar(image, ax=heat, format=PercentFormatter(1, decimals=0), extend="max", pad=0.02)
    bar.set_label("tokens that use it")
    for colour, (policy, points) in zip(_COLOURS, curves.items(), strict=False):
        shares, found = zip(*sorted(points), strict=True)
        dashed = "--" if policy == "belady" else "-"
        hits.plot(shares, found, dashed, marker="o", markersize=3, color=colour, label=policy)
    hits.plot([0, 1], [0, 1], ":", color="#999999", linewidth=1, label="all experts alike")
    hits.set_xlim(0, 1.02 * max((share for points in curves.values() for share, _ in points), default=1))
    hits.set_ylim(0, 1)
    hits.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    hits.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    hits.set_xlabel("experts that are resident")
    hits.set_ylabel("requests that are hits")
    hits.grid(color="#dddddd", linewidth=0.6)
    hits.spines[["top", "right"]].set_visible(False)
    hits.legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(file, dpi=150)
