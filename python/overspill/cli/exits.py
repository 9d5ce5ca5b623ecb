"""How a command ends: its exit code, and an error as one line."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from overspill._core import Error
from overspill.cli.options import with_option_names
from overspill.cli.output import errors, set_up_streams

__all__ = ["ERROR", "EXIT_CODES", "INTERRUPTED", "PIPE_CLOSED", "USAGE", "guarded_command", "report_bug"]

EXIT_CODES = "Exit codes: 0 done, 1 an error, 2 a wrong command line, 130 interrupted, 141 nobody reads the output."
ERROR, USAGE, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141


def _fail(message: str, code: int) -> NoReturn:
    """Print a line on standard error, and end with ``code``."""
    errors.print(f"error: {' '.join(message.splitlines())}", soft_wrap=True)
    raise typer.Exit(code)


def _print_traceback(error: BaseException) -> None:
    errors.print("".join(traceback.format_exception(error)), end="", soft_wrap=True)


def report_bug(error: Exception, *, verbose: bool | None) -> None:
    """Print an error that nobody foresaw as one line, and its traceback if ``verbose`` is not False.

    ``verbose`` is None in a command without that option.
    """
    if verbose is not False:
        _print_traceback(error)
    advice = "; --verbose shows where" if verbose is False else ""
    line = f"error: a bug in overspill{advice}: {type(error).__name__}: {error}"
    errors.print(" ".join(line.split()), soft_wrap=True)


@contextmanager
def guarded_command(*, verbose: bool | None = None) -> Iterator[None]:
    """Set the standard streams up for a command's body, and turn its errors into one line and an exit code.

    The command line gives every option its type, so that only a value can be a user's mistake, and checks of values
    raise ValueError. Any other error that the library does not define, such as a TypeError, is a bug.

    Parameters
    ----------
    verbose
        Whether the log of llama.cpp and tracebacks are shown. None, where a command has no such option, shows the
        tracebacks of bugs alone.
    """
    set_up_streams(verbose=bool(verbose))
    try:
        yield
        sys.stdout.flush()
    except typer.Exit:
        raise
    except BrokenPipeError:
        # The reader has gone, as `head` does; without this Python would complain at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(PIPE_CLOSED) from None
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    except ValueError as error:
        if verbose:  # a bug can raise it, too
            _print_traceback(error)
        _fail(with_option_names(str(error)), USAGE)
    except (Error, OSError) as error:
        _fail(with_option_names(str(error)), ERROR)
    except Exception as error:
        report_bug(error, verbose=verbose)
        raise typer.Exit(ERROR) from None
