"""Whether counts are what probabilities say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Z_OF_1_IN_10_000 = 3.72


def deviation(observed: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return by how many standard deviations chi-square is over its mean; cells of under ten are pooled in one."""
    enough = expected >= 10
    o = np.append(observed[enough], observed[~enough].sum())
    e = np.append(expected[enough], expected[~enough].sum())
    chi_square = float(((o - e) ** 2 / np.maximum(e, 1e-9)).sum())
    degrees = max(len(e) - 1, 1)
    # Wilson and Hilferty's cube root brings chi-square close to a normal distribution.
    return float((chi_square / degrees) ** (1 / 3) - 1 + 2 / (9 * degrees)) / math.sqrt(2 / (9 * degrees))
