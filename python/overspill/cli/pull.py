"""``overspill pull``: a model of the Hugging Face hub is downloaded."""

from __future__ import annotations

from typing import Annotated

import typer

from overspill.catalogue.download import HubName, bring
from overspill.cli.exits import guarded_command
from overspill.cli.output import errors

__all__ = ["pull"]


def pull(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="hf:OWNER/REPOSITORY, hf:OWNER/REPOSITORY:QUANT or hf:OWNER/REPOSITORY/FILE.gguf, with @REVISION "
            "at will. Without QUANT, the best quantisation that fits this machine.",
        ),
    ],
) -> None:
    """Download MODEL into the Hugging Face hub's cache, and print where its file is."""
    with guarded_command():
        wanted = HubName.parse(model)
        print(bring(wanted, lambda line: errors.print(line, soft_wrap=True), use_cache=False))
