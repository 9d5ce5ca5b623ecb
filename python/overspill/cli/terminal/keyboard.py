"""The keyboard in a chat: keys and history of the input, and no echo during an answer."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from rich.console import Console

from overspill.base.files import user_folder

__all__ = ["no_echo", "prompt_session"]


def prompt_session(notices: Console) -> PromptSession[str]:
    """Return a prompt for messages, with its keys and the history of earlier chats."""
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif buffer.text.strip():
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("escape", "c-j")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    history: History = InMemoryHistory()
    file = user_folder("XDG_DATA_HOME", ".local/share", "Library/Application Support") / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Messages are private.
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        history = FileHistory(file)
    except OSError as error:
        notices.print(f"the history is not kept: {file}: {error.strerror}", style="dim", markup=False, soft_wrap=True)
    return PromptSession(
        [("bold", "> ")],
        multiline=True,
        prompt_continuation="  ",
        key_bindings=keys,
        history=history,
        enable_suspend=True,
        output=create_output(stdout=sys.stdout if sys.stdout.isatty() else sys.stderr),
    )


@contextmanager
def no_echo() -> Iterator[None]:
    """Hide typed text during an answer, and leave it to the next input; Ctrl-C works as usual."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    quiet = list(before)
    quiet[0] &= ~termios.ICRNL
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(terminal, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
