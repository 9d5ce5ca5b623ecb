"""Write the models that revisions are compared with into a folder: ``write_models.py FOLDER``.

Prints their paths as JSON, in the order of :class:`quantities.measuring.Models`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from header_files import write_header
from model_files import write_tiny_gpt_oss
from model_fixtures import gemma_file


def main() -> None:
    """Write, and print."""
    folder = Path(sys.argv[1])
    tiny, header = folder / "tiny-gpt-oss.gguf", folder / "gpt-oss-120b-header.gguf"
    write_tiny_gpt_oss(tiny)
    write_header(header, "gpt-oss-120b", vocabulary=True)
    print(json.dumps([str(gemma_file()), str(tiny), str(header)]))


if __name__ == "__main__":
    main()
