"""Print how far speeds are from what was predicted: ``predictions.py FILE``, of ``compare_placements.py --json FILE``.

A prediction is good enough to choose a placement by if it is within 15 % of what is measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

GOOD_ENOUGH = 0.15


def main() -> int:
    """Print a line for each placement that was measured; return 1 if one was predicted badly."""
    worst = 0.0
    for model in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["models"]:
        for row in model["rows"]:
            measured, outlook = row["tokens_per_s"], row["forecast"]
            if measured is None or outlook is None:
                print(f"{model['name']}, {row['name']}: {row['problem'] or 'not measured'}")
                continue
            error = outlook["tokens_per_s"] / measured - 1
            verdict = "within" if abs(error) <= GOOD_ENOUGH else "NOT within"
            figures = f"{outlook['tokens_per_s']:.2f} tok/s predicted, {measured:.2f} measured: {error:+.0%}"
            print(f"{model['name']}, {row['name']}: {figures}, {verdict} {GOOD_ENOUGH:.0%}")
            worst = max(worst, abs(error))
    return 1 if worst > GOOD_ENOUGH else 0


if __name__ == "__main__":
    sys.exit(main())
