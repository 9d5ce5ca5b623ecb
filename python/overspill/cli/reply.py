"""A model for ``run`` and ``chat``: loaded with a progress bar, and its reply on standard output."""

from __future__ import annotations

import os
from typing import Any

import overspill
from overspill.cli.exits import INTERRUPTED
from overspill.cli.output import errors, progress_bar, write_reply

__all__ = ["load_model", "print_stream"]


def load_model(path: os.PathLike[str], **options: Any) -> overspill.Model:
    """Return a model; on a terminal a bar shows its loading. ``options`` are those of :class:`overspill.Model`."""
    with progress_bar("loading") as show:
        return overspill.Model(path, progress=lambda share: show("loading", share), **options)


def print_stream(stream: overspill.Stream | overspill.ChatStream) -> int:
    """Print a reply without its reasoning while it is generated, then the stats; return the exit code."""
    code = 0
    try:
        with stream:
            for token in stream:
                if not (isinstance(token, overspill.ChatToken) and token.channel is overspill.Channel.REASONING):
                    write_reply(token.text)
    except KeyboardInterrupt:
        code = INTERRUPTED
    write_reply("\n")
    errors.print(str(stream.stats), style="dim")
    return code
