"""How a command ends: its exit code, and an error as one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from overspill._core import Error
from overspill.cli.output import errors

__all__ = ["ERROR", "EXIT_CODES", "INTERRUPTED", "PIPE_CLOSED", "USAGE", "fail", "one_line_errors"]

EXIT_CODES = "Exit codes: 0 done, 1 an error, 2 a wrong command line, 130 interrupted, 141 nobody reads the output."
ERROR, USAGE, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141


def fail(message: str, code: int) -> NoReturn:
    """Print a line on standard error, and end with ``code``."""
    errors.print(f"error: {message}", markup=False, soft_wrap=True)
    raise typer.Exit(code)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can cause into one line and an exit code."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone, as `head` does; without this Python would complain at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(PIPE_CLOSED) from None
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except (ValueError, TypeError) as error:
        fail(str(error), USAGE)
    except (Error, OSError) as error:
        fail(str(error), ERROR)
