"""A model for ``run`` and ``chat``: loaded with a progress bar, and its reply on standard output."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from rich.text import Text

import overspill
from overspill.base.text import printable
from overspill.catalogue.demo import DEMO, demo_model
from overspill.cli.exits import INTERRUPTED
from overspill.cli.options import LoadOptions
from overspill.cli.output import Output, errors, progress_bar, write_reply
from overspill.hub import resolve

__all__ = ["BYTES_PER_TOKEN", "default_model", "is_model", "load_model", "print_stream"]


BYTES_PER_TOKEN = 4
"""About, in English: before a model is loaded, nobody knows its tokens."""


def default_model() -> Path:
    """Return the file of the demo model, and say which it is; it is downloaded the first time."""
    errors.print(f"no model was given: {DEMO.description}", style="dim")
    with progress_bar("downloading") as show:
        return demo_model(lambda share: show(f"downloading {DEMO.name}", share))


def is_model(text: str) -> bool:
    """Return whether a text names a model, and is hardly a prompt."""
    if any(character.isspace() for character in text):
        return False
    if text.startswith("hf:") or text.endswith(".gguf"):
        return True
    try:
        return os.path.isfile(resolve(text))  # noqa: PTH113  # no error for a text that is too long for a file
    except (overspill.Error, ValueError):
        return False


def load_model(path: os.PathLike[str], loading: LoadOptions, **exchange: Any) -> overspill.Model:
    """Return a model; on a terminal a bar shows its loading.

    ``exchange`` are the tokens of the prompt and of the reply at hand, as :class:`overspill.Model` has them.
    """
    given = loading.given() | exchange
    with progress_bar("loading") as show:
        return overspill.Model(loading.model(path), progress=lambda share: show("loading", share), **given)


def print_stream(stream: overspill.Stream | overspill.ChatStream) -> int:
    """Print a reply while it is generated, then the stats; return the exit code.

    Its reasoning is shown in a terminal alone, dimmed.
    """
    code = 0
    said = reasoned = False
    try:
        with stream:
            for token in stream:
                if isinstance(token, overspill.ChatToken) and token.channel is overspill.Channel.REASONING:
                    reasoned |= _show_reasoning(token.text)
                    continue
                if reasoned and token.text:
                    write_reply("\n\n")
                    reasoned = False
                said |= bool(token.text)
                write_reply(token.text)
    except KeyboardInterrupt:
        code = INTERRUPTED
    write_reply("\n")
    if not said and stream.stats.stop_reason is overspill.StopReason.EOS:
        errors.print("the model ended its reply without a text; another prompt may help")
    errors.print(str(stream.stats), style="dim", soft_wrap=True)
    return code


def _show_reasoning(text: str) -> bool:
    if not text or not sys.stdout.isatty():
        return False
    Output().print(Text(printable(text), "dim"), end="", soft_wrap=True)
    sys.stdout.flush()
    return True
