"""Answers as they are made: by one model, or by a small one that a large one helps out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, TypeAlias

from overspill.base.values import Stats, Token
from overspill.cascade.signals import mean_logprob
from overspill.cascade.stream import CascadeStream, Which
from overspill.engine.async_stream import AsyncStream
from overspill.engine.model import Model
from overspill.engine.reply import ChatStream, ChatToken
from overspill.engine.stream import Stream
from overspill.server.models import Models
from overspill.server.replies import Outcome

__all__ = ["Answer", "CascadeAnswer", "Options", "Start"]

Options: TypeAlias = Mapping[str, Any]
Start: TypeAlias = Callable[[Model, Options], Stream | ChatStream]
"""Opens a model's stream with the options of a text."""


class Answer(AsyncStream[Token | ChatToken]):
    """A model's answer."""

    def __init__(
        self, name: str, model: Model, start: Start, options: Options, *, ends_with_call: bool = False
    ) -> None:
        """Take what opens the stream, and whether its first call of a tool is its end."""
        super().__init__(partial(start, model, options))
        self._name, self._model = name, model
        self._ends_with_call, self._has_call = ends_with_call, False

    async def __anext__(self) -> Token | ChatToken:
        """Return the next token, or raise ``StopAsyncIteration`` at the end."""
        if self._ends_with_call and self._has_call:
            await self.aclose()
        token = await super().__anext__()
        self._has_call = self._has_call or (isinstance(token, ChatToken) and token.tool_call is not None)
        return token

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token of the model that answers."""
        return self._model.token_bytes(token)

    @property
    def outcome(self) -> Outcome:
        """The stats of the answer, and who made it."""
        return Outcome(self.stats, self._name)

    @property
    def stats_by_model(self) -> Mapping[str, Stats]:
        """The stats of each model that was asked, by its name."""
        return {self._name: self.stats}


class CascadeAnswer(Answer):
    """A cascade's answer.

    A model is in use while it decodes: where both do not fit, the small one makes room for the large one.

    Parameters
    ----------
    models
        The models that can be loaded.
    names
        Those of the pair.
    using
        Ends the use of a model when it is closed; it has the small one.
    small
        The small model.
    start, options, ends_with_call
        As for an :class:`Answer`, for both models.
    """

    def __init__(
        self,
        models: Models,
        names: Mapping[Which, str],
        using: AsyncExitStack,
        small: Model,
        start: Start,
        options: Options,
        *,
        ends_with_call: bool = False,
    ) -> None:
        """Begin nothing yet."""
        super().__init__(names["small"], small, start, options, ends_with_call=ends_with_call)
        self._models, self._names, self._using = models, names, using
        self._loop = asyncio.get_running_loop()
        self._changing: asyncio.Task[Any] | None = None
        self._cascade: CascadeStream | None = None

        def begin() -> _Steps:
            self._cascade = CascadeStream(self._lend, [mean_logprob()], start, options, show_draft=False)
            return _Steps(self._cascade, keeps_logprobs=bool(options.get("logprobs")))

        self._start = begin

    @property
    def outcome(self) -> Outcome:
        """The stats of the answer, who made it, and why that model."""
        if self._cascade is None:
            return super().outcome
        both = self._cascade.stats
        return Outcome(self.stats, self._names[both.answered_by or "small"], both.reason)

    @property
    def stats_by_model(self) -> Mapping[str, Stats]:
        """The stats of each model that was asked, by its name."""
        if self._cascade is None:
            return super().stats_by_model
        both = self._cascade.stats
        large = {} if both.large is None else {self._names["large"]: both.large}
        return {self._names["small"]: both.small, **large}

    async def aclose(self) -> None:
        """End the answer, and the waiting for a model."""
        if self._changing is not None:
            self._changing.cancel()
        await super().aclose()

    def _lend(self, which: Which, _: CascadeStream) -> tuple[Model, bool]:
        """Return a model; called in the stream's thread."""
        if which == "large":
            self._model = asyncio.run_coroutine_threadsafe(self._change(), self._loop).result()
        return self._model, False

    async def _change(self) -> Model:
        if self._ended:
            raise asyncio.CancelledError  # nobody would give the large one back
        self._changing = asyncio.current_task()
        await self._using.aclose()
        return await self._using.enter_async_context(self._models.using(self._names["large"]))


class _Steps:
    """A cascade's stream with the tokens and the stats of the model that answers."""

    def __init__(self, stream: CascadeStream, *, keeps_logprobs: bool) -> None:
        self._stream, self._keeps_logprobs = stream, keeps_logprobs

    def __next__(self) -> Token | ChatToken:
        one = next(self._stream)
        # Those that judge the small model are not for the client.
        return one.token if self._keeps_logprobs else ChatToken(one.id, one.text, one.channel, tool_call=one.tool_call)

    def close(self) -> None:
        self._stream.close()

    @property
    def stats(self) -> Stats:
        both = self._stream.stats
        return both.large or both.small
