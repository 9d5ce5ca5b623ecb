"""A conversation in a terminal: the loop of questions and answers, and its commands."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.text import Text

from overspill._core import Error
from overspill.base.text import printable
from overspill.base.units import format_count
from overspill.base.values import StopReason
from overspill.cli.exits import report_bug
from overspill.cli.output import Output
from overspill.cli.terminal.interrupt import HeldInterrupt
from overspill.cli.terminal.keyboard import no_echo, prompt_session
from overspill.cli.terminal.screen import Reasoning, ReplyOnScreen
from overspill.engine.conversation import Chat
from overspill.engine.reply import Channel, ChatStream, ChatToken

__all__ = ["ChatTerminal"]


_COMMAND = re.compile(r"/([a-z?]+)(?:\s+(.*))?", re.DOTALL | re.IGNORECASE)
_STOPPED = (StopReason.INTERRUPTED, StopReason.CLOSED)
_KEYS = """\
Enter sends; Alt+Enter, or a backslash before Enter, begins a new line; a paste keeps its lines.
Ctrl-C stops an answer, and what came of it stays; Ctrl-D on an empty line ends the chat.
A message that begins with a slash and a word is sent if a space comes before it."""


class ChatTerminal:
    """Talks with a person until they end it."""

    def __init__(
        self,
        chat: Chat,
        notices: Console,
        *,
        reasoning: Reasoning = "dim",
        file: Path | None = None,
        session: Path | None = None,
        verbose: bool = False,
    ) -> None:
        """Continue ``chat``, loaded from ``file`` if that is given; all but replies is printed on ``notices``.

        ``session`` is the file that it is written to, with its state, at the end or before another one begins.
        """
        self._chat, self._notices, self._reasoning, self._file = chat, notices, reasoning, file
        self._session, self._verbose = session, verbose
        self._output = Output()
        self._latest: ChatStream | None = None
        self._draft = ""  # the text that the next input begins with
        self._is_over = False
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "help": ("", "list the commands and keys", self._help),
            "system": ("[TEXT]", "show or set the system prompt; - removes it", self._system),
            "retry": ("", "answer the last message anew", self._retry),
            "new": ("", "begin a new conversation; the system prompt stays", self._new),
            "save": ("FILE", "write the conversation to a file", self._save),
            "load": ("FILE", "go on with a saved conversation", self._load),
            "reasoning": ("dim|hide", "set how reasoning is shown", self._set_reasoning),
            "stats": ("", "show the speed of the last reply, and how full the context is", self._stats),
            "placement": ("", "show which part of the model is on which device", self._placement),
            "exit": ("", "end the chat", self._exit),
        }

    def run(self) -> None:
        """Ask and answer until /exit or Ctrl-D."""
        try:
            self._talk()
        finally:
            self._keep()

    def _talk(self) -> None:
        session = prompt_session(self._notices)
        info = self._chat.model.info
        name = info.name or self._chat.model.path.name
        self._notice(f"{name} · {self._chat.model.n_ctx} tokens of context · /help for help")
        self._show_latest()
        while not self._is_over:
            draft, self._draft = self._draft, ""
            try:
                text: str = session.prompt(default=draft)
            except KeyboardInterrupt:
                if not session.default_buffer.text:
                    self._notice("Ctrl-D or /exit ends the chat")
                continue
            except EOFError:
                return
            self._take(text)

    def _take(self, text: str) -> None:
        command = _COMMAND.fullmatch(text.rstrip())
        try:
            if command is None:
                message = text.strip()
                self._answer(lambda: self._chat.send(message), message)
            elif command[1].lower() in self._commands:
                self._commands[command[1].lower()][2]((command[2] or "").strip())
            else:
                self._complain(f"there is no command /{command[1]}: /help lists them; a space before it sends it")
        except KeyboardInterrupt:
            self._notice("stopped")
        except (Error, OSError, ValueError) as error:
            self._complain(str(error))
        except Exception as error:
            # The conversation so far is worth more than the program's end.
            report_bug(error, verbose=self._verbose)

    def _notice(self, text: str) -> None:
        self._notices.print(printable(text), style="dim", markup=False, soft_wrap=not self._notices.is_terminal)

    def _complain(self, text: str) -> None:
        self._notices.print(f"error: {printable(text)}", markup=False, soft_wrap=not self._notices.is_terminal)

    # --- answers

    def _answer(self, ask: Callable[[], ChatStream], message: str) -> None:
        """Show a reply; without one, leave the conversation unchanged and offer ``message`` for editing."""
        before = list(self._chat.messages)
        shown = ReplyOnScreen(self._output, self._reasoning)
        stream: ChatStream | None = None
        try:
            with self._held_warnings(), no_echo(), HeldInterrupt() as interrupt, shown:
                stream = self._latest = ask()
                with stream:
                    interrupt.deliver()
                    for token in stream:
                        shown.take(token)
                        interrupt.deliver()
        except KeyboardInterrupt:
            pass
        finally:
            if stream is None or not stream.raw:
                self._chat.messages = before
                self._draft = message
        if stream is None or not stream.raw:
            stopped = stream is None or stream.stats.stop_reason in _STOPPED
            what = "stopped before the answer" if stopped else "the model said nothing"
            self._notice(f"{what}: the message is not part of the chat")
            return
        stats = stream.stats
        if stats.stop_reason in _STOPPED:
            self._notice("stopped")
        elif stats.stop_reason is StopReason.MAX_TOKENS:
            self._notice(f"cut off after {stats.tokens} tokens")
        elif stats.stop_reason is StopReason.CONTEXT_FULL:
            self._notice(f"cut off: the context of {self._chat.model.n_ctx} tokens is full; /new begins anew")
        if stats.dropped_tokens:
            self._notice(f"the oldest turns, {stats.dropped_tokens} tokens, are left out: the context is full")

    @contextmanager
    def _held_warnings(self) -> Iterator[None]:
        """Hold warnings back until the reply has ended: between its lines, they would disturb the drawing."""
        logger = logging.getLogger("overspill")
        warnings = _Records()
        handlers, logger.handlers = logger.handlers, [warnings]
        try:
            yield
        finally:
            logger.handlers = handlers
            for record in warnings.records:
                self._notice(f"{record.levelname.lower()}: {record.getMessage()}")

    # --- commands

    def _help(self, _: str) -> None:
        width = max(len(f"/{name} {argument}") for name, (argument, *_) in self._commands.items())
        lines = [f"{f'/{name} {argument}':{width}}  {what}" for name, (argument, what, _) in self._commands.items()]
        self._output.print("\n".join([*lines, "", _KEYS]), markup=False)

    def _system(self, text: str) -> None:
        if not text:
            self._output.print(printable(self._chat.system or "there is no system prompt"), markup=False)
            return
        self._chat.system = None if text == "-" else text
        self._notice(
            "the system prompt is removed" if text == "-" else "the system prompt holds from the next reply on"
        )

    def _retry(self, _: str) -> None:
        self._answer(self._chat.retry, "")

    def _keep(self) -> None:
        """Write the conversation to the session's file, if it is that one's."""
        if self._session is not None and self._chat.messages:
            self._chat.save(self._session, state=True)
            self._notice(f"{format_count(len(self._chat.messages), 'message')} kept in {self._session}")

    def _new(self, _: str) -> None:
        self._keep()
        chat = Chat(self._chat.model, system=self._chat.system, **self._chat.options)
        self._chat, self._file, self._latest, self._session = chat, None, None, None
        self._notice("a new conversation")

    def _path(self, command: str, text: str) -> Path:
        if not text and self._file is None:
            raise ValueError(f"/{command} needs the name of a file: /{command} FILE")
        return Path(text).expanduser() if text else self._file or Path()

    def _save(self, text: str) -> None:
        path = self._path("save", text)
        # Replace only the file of this conversation.
        if path.exists() and (self._file is None or not path.samefile(self._file)):
            raise ValueError(f"{path} is there already, and not replaced: give another name")
        self._chat.save(path)
        self._file = path
        self._notice(f"{format_count(len(self._chat.messages), 'message')} saved to {path}")

    def _load(self, text: str) -> None:
        path = self._path("load", text)
        self._keep()  # before another takes its place
        chat = Chat.load(path, self._chat.model, **self._chat.options)
        self._chat, self._file, self._latest, self._session = chat, path, None, None
        self._show_latest()

    def _show_latest(self) -> None:
        """Show the last question and its answer of a loaded conversation."""
        messages = self._chat.messages
        if self._file is None:
            return
        self._notice(f"{format_count(len(messages), 'message')} loaded from {self._file}")
        asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
        for message in messages[asked[-1] :] if asked else []:
            content = str(message.get("content") or "")
            if message["role"] == "user":
                self._output.print(Text("> ", "bold") + Text(printable(content)))
            elif message["role"] == "assistant":
                with HeldInterrupt(), ReplyOnScreen(self._output, self._reasoning) as shown:
                    shown.take(ChatToken(0, content, Channel.FINAL))

    def _set_reasoning(self, text: str) -> None:
        if text == "dim":
            self._reasoning = "dim"
        elif text == "hide":
            self._reasoning = "hide"
        else:
            raise ValueError("/reasoning must be dim or hide")
        self._notice(f"reasoning: {text}")

    def _stats(self, _: str) -> None:
        if self._latest is None:
            self._notice("there is no reply yet")
            return
        stats = self._latest.stats
        n_ctx = self._chat.model.n_ctx
        used = min(stats.prompt_tokens + stats.tokens, n_ctx)  # dropped turns no longer take up room
        self._output.print(str(stats), markup=False)
        n_messages = format_count(len(self._chat.messages), "message")
        self._output.print(f"{n_messages} · {used} of {n_ctx} tokens of context ({used / n_ctx:.0%})", markup=False)

    def _placement(self, _: str) -> None:
        self._output.print(self._chat.model.placement)

    def _exit(self, _: str) -> None:
        self._is_over = True


class _Records(logging.Handler):
    """Keeps the records of a log."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
