"""``python -m overspill`` is the command ``overspill``."""

from overspill.cli.app import main

main()
