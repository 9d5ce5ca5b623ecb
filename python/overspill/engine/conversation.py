"""A conversation: the messages so far, and the replies that continue it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from overspill._core import Error
from overspill.base.checks import as_flag, as_instance, as_json, as_path, as_text, check_keywords, naming, shown
from overspill.base.files import read_json, replace_json
from overspill.base.text import short_repr
from overspill.base.units import format_count
from overspill.base.values import StopReason
from overspill.engine.keywords import CHAT_KEYWORDS, ChatKeywords
from overspill.engine.model import Model
from overspill.engine.reply import ChatReply, ChatStream, ToolCall
from overspill.engine.session import identity
from overspill.engine.template import Message, checked_messages

__all__ = ["Chat"]

_OF_PROMPTS = ("tools", "tool_choice", "reasoning_effort", "thinking", "json_schema", "on_full")


class Chat:
    """A conversation with a model: its messages, and methods that continue it.

    >>> chat = overspill.Chat(model, system="Answer in one sentence.")
    >>> for token in chat.send("Why is the sky blue?"):
    ...     print(token, end="")
    """

    _FORMAT = "overspill chat 1"

    def __init__(self, model: Model, *, system: str | None = None, **options: Unpack[ChatKeywords]) -> None:
        """Begin a conversation without messages.

        Parameters
        ----------
        model
            A loaded model with a chat template.
        system
            The system message, which the model gets first.
        **options
            Options of :meth:`Model.chat` for every reply.

        Raises
        ------
        Error
            The model has no chat template.
        TypeError
            There is no such option.
        """
        self.model = as_instance("model", model, Model)
        check_keywords(options, CHAT_KEYWORDS)
        _ = model.chat_template  # whose error says why there is none
        self.options = ChatKeywords(**options)
        self._open: ChatStream | None = None
        self.messages: list[dict[str, Any]] = []
        """The messages so far. They may be edited; the longest beginning that stays is not decoded again."""
        if system is not None:
            self.system = system

    @property
    def system(self) -> str | None:
        """The text of the system message, or None; set it to change, add or remove the message."""
        first = self.messages[0] if self.messages else {}
        return first.get("content") if first.get("role") == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        if text is not None:
            as_text("system", text)
        if self.system is not None:
            del self.messages[0]
        if text is not None:
            self.messages.insert(0, {"role": "system", "content": text})

    def ask(self, message: str | Message | None = None, **options: Unpack[ChatKeywords]) -> ChatReply:
        """Return the whole reply to ``message``, and add both to the conversation; as :meth:`send`."""
        return self.send(message, **options).finish()

    def send(self, message: str | Message | None = None, **options: Unpack[ChatKeywords]) -> ChatStream:
        """Return the stream of a reply to ``message``.

        The message is added to the conversation at once, the reply when its stream has ended. If the stream ends
        without any text of the model, the message is taken back. An open stream of this conversation is closed first.

        Parameters
        ----------
        message
            A text of the user, any message, or None for a reply to the conversation as it is.
        **options
            Options of :meth:`Model.chat` for this reply.
        """
        check_keywords(options, CHAT_KEYWORDS)
        new: list[dict[str, Any]] = []
        if message is not None:
            if not isinstance(message, str | Mapping):
                raise TypeError(f"message must be a string or a mapping, not {shown(message)}")
            with naming("message"):
                new = [dict(part) for part in checked_messages(message if isinstance(message, str) else [message])]
        self._close_open()
        return self._answer([*self.messages, *new], options)

    def _answer(self, messages: list[dict[str, Any]], options: ChatKeywords) -> ChatStream:
        before = list(self.messages)
        stream = self.model.chat(messages, **(self.options | options))
        asked = messages[-1]

        def add(ended: ChatStream) -> None:
            if not self.messages or self.messages[-1] is not asked:
                return  # the history was edited in the meantime
            if ended.raw or ended.stats.stop_reason == StopReason.EOS:
                self.messages.append(ended.message)
            else:
                self.messages[:] = before

        stream.on_end = add
        self._open = stream
        self.messages[:] = messages
        return stream

    def _close_open(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def add_result(self, call: ToolCall, result: object) -> None:
        """Add the result of a tool, a text or anything that JSON can hold; ``send()`` then streams the reply to it."""
        as_instance("call", call, ToolCall)
        content = as_text("result", result) if isinstance(result, str) else as_json("result", result)
        self.messages.append({"role": "tool", "tool_call_id": call.id, "name": call.name, "content": content})

    def __repr__(self) -> str:
        """Return the model's file and the number of messages in brackets."""
        return short_repr(self, f"{self.model.path.name!r} {format_count(len(self.messages), 'message')}")

    def _last_question(self) -> int | None:
        users = (i for i in range(len(self.messages) - 1, -1, -1) if self.messages[i]["role"] == "user")
        return next(users, None)

    def undo(self) -> Any:
        """Return the content of the last question, which is removed with all that followed; None without a question."""
        self._close_open()
        at = self._last_question()
        if at is None:
            return None
        question = self.messages[at]["content"]
        del self.messages[at:]
        return question

    def retry(self, **options: Unpack[ChatKeywords]) -> ChatStream:
        """Return the stream of another reply to the last question; the earlier reply stays if no text comes.

        Raises
        ------
        Error
            There is no question yet.
        """
        check_keywords(options, CHAT_KEYWORDS)
        self._close_open()
        at = self._last_question()
        if at is None:
            raise Error("there is no question yet that could be answered anew")
        return self._answer(self.messages[: at + 1], options)

    def branch(self) -> Chat:
        """Return another conversation, with copies of the messages so far."""
        other = Chat(self.model, **self.options)
        other.messages = copy.deepcopy(self.messages)
        return other

    # --- on disk

    def save(self, path: str | os.PathLike[str], *, state: bool = False) -> None:
        """Write the conversation to a JSON file, with a checksum and the model's identity.

        An earlier file is replaced as a whole: an interruption leaves the old one.

        Parameters
        ----------
        path
            The file.
        state
            Whether to write what the KV cache has of the conversation too, to a file beside it with ``.state`` added
            to its name. :meth:`load` loads it from there, and the conversation is not read again. No such file is
            written if the KV cache has nothing of it any more. :meth:`Model.save_state` says which models it fits.

        Raises
        ------
        Error
            A file cannot be written.
        """
        file = as_path("path", path)
        state = as_flag("state", state)
        as_json("messages", self.messages)
        content = {"format": self._FORMAT, "model": identity(self.model.info), "messages": self.messages}
        try:
            replace_json(file, {**content, "sha256": _checksum(content)})
        except OSError as error:
            raise Error(f"{file}: {error.strerror or error}") from None
        if state and self.messages:
            asked: dict[str, Any] = {key: value for key, value in self.options.items() if key in _OF_PROMPTS}
            saved = self.model._core.save_state(self.model.chat_template.prepare(self.messages, **asked).tokens)
            if saved is not None:
                self.model._states.write(_state_file(file), saved)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Model, **options: Unpack[ChatKeywords]) -> Chat:
        """Return the conversation that :meth:`save` wrote to a file; ``options`` are those of :meth:`Model.chat`.

        If its state is in the file beside it, that is loaded too, as by :meth:`Model.load_state`.

        Raises
        ------
        Error
            The file is missing, damaged, or no saved conversation; or it is one with another model. Or the state is
            damaged, or does not fit: without its file, the conversation is loaded alone.
        """
        file = as_path("path", path)
        as_instance("model", model, Model)
        check_keywords(options, CHAT_KEYWORDS)
        try:
            data = read_json(file)
        except ValueError:
            data = None
        if not isinstance(data, dict) or data.get("format") != cls._FORMAT:
            raise Error(f"{path}: is damaged, or not a chat that was saved by this version")
        checksum = data.pop("sha256", None)
        if checksum != _checksum(data):
            raise Error(f"{path}: is damaged: its checksum is wrong")
        try:
            name, messages = data["model"]["name"], data["messages"]
            messages = [dict(message) for message in checked_messages(messages)] if messages != [] else []
        except (KeyError, TypeError, ValueError) as error:
            raise Error(f"{path}: is damaged: {shown(error)}") from None
        if data["model"] != identity(model.info):
            raise Error(
                f"{path}: was saved with another model, {shown(name)}, and not with {model.path.name}; load that one"
            )
        chat = cls(model, **options)
        chat.messages = messages
        if os.path.lexists(_state_file(file)):
            model.load_state(_state_file(file))
        return chat


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _state_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.state")
