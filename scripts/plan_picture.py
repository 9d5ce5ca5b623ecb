"""Draw docs/plan.svg: ``overspill plan`` in a terminal, for gpt-oss-120b on a GPU with 24 GiB.

``python scripts/plan_picture.py gpt-oss-120b.gguf [PICTURE]`` needs no more of the file than its header.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).parents[1] / "docs/plan.svg"
OPTIONS = ("--vram", "24GiB", "--ram", "128GiB", "--ctx", "8192")
COLUMNS = 96
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def main() -> None:
    """Run the command, and write the picture."""
    model, *rest = sys.argv[1:]
    file = Path(rest[0]) if rest else PICTURE
    done = subprocess.run(
        [sys.executable, "-m", "overspill", "plan", model, *OPTIONS], capture_output=True, encoding="utf-8", check=True
    )
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), highlight=False)
    console.print(Text(f"$ overspill plan gpt-oss-120b.gguf {' '.join(OPTIONS)}", "bold green"))
    said = re.sub(r"(\S) \n(?=\S)", r"\1 ", done.stdout.partition("\nubatch ")[0])  # a pipe's lines end elsewhere
    for number, line in enumerate(said.rstrip().splitlines()):
        console.print(Text(line.rstrip(), "bold" if number < 2 else ""))
    picture = console.export_svg(title="overspill plan", unique_id="plan")
    # Nothing from elsewhere: the reader's own fonts.
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL).replace("Fira Code, monospace", FONT)
    picture = re.sub(r"font-family: (?:arial|Fira Code)[^;]*;", f"font-family: {FONT};", picture)
    file.write_text(re.sub(r"[ \t]+$", "", picture, flags=re.MULTILINE).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
