"""A terminal for tests: a program behind a pseudo-terminal, and the screen that a person would see."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pexpect: Any = pytest.importorskip("pexpect", reason="a terminal is played by pexpect, which needs a POSIX system")
pyte: Any = pytest.importorskip("pyte")

PATIENCE_S = 180  # for a busy machine; what is waited for comes in a second or two


def lines_of(screen: Any) -> list[str]:
    """Return what a person can scroll through, from the top: text alone, and no empty lines at the end."""
    rows = [*screen.history.top, *(screen.buffer[y] for y in range(screen.lines))]
    lines = ["".join(row[x].data for x in range(screen.columns)).rstrip() for row in rows]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def screen_of(output: str, *, columns: int = 80, rows: int = 24) -> Any:
    """Return the screen after output of a program, whose lines end as a terminal ends them."""
    screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=0.5)
    pyte.Stream(screen).feed(output.replace("\n", "\r\n"))
    return screen


class Terminal:
    """Python with arguments, in a terminal of 80 columns and 24 rows."""

    def __init__(self, arguments: Sequence[str], data: Path, *, rows: int = 24) -> None:
        """Start it; what it keeps of the user goes to ``data``."""
        environment = {**os.environ, "TERM": "xterm-256color", "XDG_DATA_HOME": str(data), "PYTHONUTF8": "1"}
        environment.pop("NO_COLOR", None)
        self.screen = pyte.HistoryScreen(80, rows, history=10_000, ratio=0.5)
        self._stream = pyte.ByteStream(self.screen)
        self._output = b""
        self._child = pexpect.spawn(sys.executable, list(arguments), env=environment, dimensions=(rows, 80))
        # Programs ask where the cursor is.
        self.screen.write_process_input = lambda text: self._child.send(text.encode())

    @property
    def lines(self) -> list[str]:
        """What can be scrolled through."""
        return lines_of(self.screen)

    @property
    def text(self) -> str:
        """The same in one."""
        return "\n".join(self.lines)

    @property
    def raw(self) -> str:
        """All that the program has written, escape sequences included."""
        return self._output.decode(errors="replace")

    def _read(self, seconds: float) -> None:
        output = self._child.read_nonblocking(65536, timeout=seconds)
        self._output += output
        self._stream.feed(output)

    def _line(self) -> int:
        return len(self.screen.history.top) + int(self.screen.cursor.y)

    def _is_asking(self) -> bool:
        row = self.screen.buffer[self.screen.cursor.y]
        return bool(row[0].data == ">" and self.screen.cursor.x == 2)

    def wait(self, what: Callable[[], object]) -> None:
        """Read what the program writes until something is so."""
        end = time.monotonic() + PATIENCE_S
        while not what():
            if time.monotonic() > end:
                pytest.fail(f"what was waited for did not come; the screen shows:\n{self.text}")
            try:
                self._read(0.1)
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                if not what():
                    pytest.fail(f"the program ended; the screen shows:\n{self.text}")
                return

    def wait_for(self, pattern: str) -> None:
        """Wait until the text matches somewhere."""
        self.wait(lambda: re.search(pattern, self.text))

    def wait_for_prompt(self) -> None:
        """Wait until it asks for a message, which is empty."""
        self.wait(self._is_asking)

    def keys(self, text: str) -> None:
        """Press keys."""
        self._child.send(text.encode())

    def type(self, text: str) -> None:
        """Press keys, and wait until the last of them show."""
        self.keys(text)
        self.wait(lambda: text[-4:] in self.lines[-1] if self.lines else False)

    def enter(self) -> int:
        """Send what was typed; return the line that it ends in."""
        line = self._line()
        self.keys("\r")
        self.wait(lambda: self._line() > line)
        return line

    def ask(self, text: str) -> str:
        """Send a message, and return what came between it and the next prompt."""
        self.wait_for_prompt()
        self.type(text)
        line = self.enter()
        self.wait(lambda: self._is_asking() and self._line() > line)
        return "\n".join(self.lines[line + 1 : self._line()]).strip("\n")

    def end(self, keys: str = "\x04") -> int | None:
        """Press keys that end it, and return the exit code."""
        self.keys(keys)
        try:
            while True:
                self._read(PATIENCE_S)
        except pexpect.EOF:
            self._child.close()
        code: int | None = self._child.exitstatus
        return code

    def close(self) -> None:
        """End it by force."""
        self._child.close(force=True)
