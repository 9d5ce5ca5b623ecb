"""``python -m overspill`` is the command ``overspill``."""

from overspill.cli import main

main()
