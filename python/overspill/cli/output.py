"""Where commands write: consoles, the log and progress bars."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.segment import Segment

from overspill.base.text import printable
from overspill.cli.options import with_option_names

__all__ = [
    "Output",
    "errors",
    "late_progress_bar",
    "progress_bar",
    "report_output",
    "set_up_streams",
    "write_reply",
]


class _Plain(Console):
    """A console that shows text as it is: control characters are left out, and marks for styles or emoji are text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments; names of files and texts of models are in them."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


errors = _Plain(stderr=True)
"""Standard error. Width and colours are those of the terminal; without one there are no colours."""


class Output(_Plain):
    """Standard output."""

    def on_broken_pipe(self) -> None:
        """Raise the error, so that the command ends with its own exit code."""
        raise


def report_output() -> Console:
    """Return standard output for tables and sentences."""
    # A pipe has no width: nothing is cut or wrapped there.
    return Output(width=None if sys.stdout.isatty() else 200)


def write_reply(text: str) -> None:
    """Write a piece of a model's text to standard output: to a pipe as it is, and to a terminal what is printable."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


class _PrintableLines(logging.Formatter):
    """Records without control characters: they may quote files and replies. Ours name the command line's options."""

    def format(self, record: logging.LogRecord) -> str:
        text = printable(super().format(record))
        return with_option_names(text) if record.name == "overspill" else text


class _ToErrors(logging.Handler):
    """Lines on standard error, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        errors.print(self.format(record), soft_wrap=True)


def set_up_streams(*, verbose: bool) -> None:
    """Send the log to standard error, and make all standard streams UTF-8."""
    handler = _ToErrors()
    handler.setFormatter(_PrintableLines("%(name)s: %(message)s"))
    logger = logging.getLogger("overspill")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    # What a model will do is said before it is loaded, where it does not simply fit.
    forecasts = logging.getLogger("overspill.forecast")
    forecasts.setLevel(logging.INFO)
    forecasts.addFilter(lambda record: verbose or record.levelno > logging.INFO or not getattr(record, "fits", False))
    # llama.cpp's warnings seldom help a user, and its errors are part of the library's.
    logging.getLogger("overspill.llama").setLevel(logging.INFO if verbose else logging.CRITICAL)
    for stream in (sys.stdout, sys.stderr, sys.stdin):
        # UTF-8 in every locale; bytes that are not text are replaced.
        cast(Any, stream).reconfigure(encoding="utf-8", errors="replace")


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[str, float], None]]:
    """Show a bar on a terminal; yield a function that takes a description and the share that is done, 0 to 1."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(description, total=1.0)
        yield lambda description, share: bar.update(task, description=description, completed=share)


@contextmanager
def late_progress_bar() -> Iterator[Callable[[str, float], None]]:
    """Yield a function as :func:`progress_bar` does; the bar appears at the first call and goes at a share of 1."""
    with ExitStack() as stack:
        shown: list[Callable[[str, float], None]] = []

        def show(description: str, share: float) -> None:
            if not shown:
                shown.append(stack.enter_context(progress_bar(description)))
            shown[0](description, share)
            if share >= 1:
                stack.close()
                shown.clear()

        yield show
