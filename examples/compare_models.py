"""Ask several models the same questions, and write an HTML page with the answers side by side.

python examples/compare_models.py REPORT.html MODEL MODEL...
"""

import sys
from pathlib import Path

import overspill

report, *models = sys.argv[1:]
questions = ["Why is the sky blue?", "Name three rivers in Europe."]

found = overspill.compare(models, questions, max_tokens=40, temperature=0)
Path(report).write_text(found.to_html(), encoding="utf-8")
for model in found.models:
    print(f"{model.tokens_per_second:.1f} tokens/s")
print(f"{report} has the answers")
