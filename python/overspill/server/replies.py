"""Replies in the form of OpenAI's API: whole ones, and the chunks of streamed ones."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from overspill.base.values import Stats, StopReason, Token
from overspill.engine.reply import Channel, ChatToken, ToolCall, call_in_message

if TYPE_CHECKING:
    from overspill.server.errors import ApiError  # which needs what the server needs, and others use these replies

__all__ = [
    "ChatReplies",
    "Event",
    "Outcome",
    "Replies",
    "TextReplies",
    "TokenBytes",
    "call_with_id",
    "measured_token",
    "usage_of",
]

Event: TypeAlias = Mapping[str, Any]
TokenBytes: TypeAlias = Callable[[int], bytes]
"""Returns the bytes of a token."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a stream."""

    stats: Stats
    answered_by: str
    """The name of the model that made the tokens."""
    reason: str | None = None
    """Why that model answered, where another one could have; None where there is one alone."""

    @property
    def finish_reason(self) -> str:
        """OpenAI's word for how it ended."""
        return "length" if self.is_cut_off else "stop"

    @property
    def is_cut_off(self) -> bool:
        """Whether the reply would have gone on."""
        return self.stats.stop_reason in (StopReason.MAX_TOKENS, StopReason.CONTEXT_FULL)

    def to_dict(self) -> dict[str, Any]:
        """Return what OpenAI's API has no place for: the speed, and who answered."""
        return {
            "answered_by": self.answered_by,
            "reason": self.reason,
            "stop_reason": self.stats.stop_reason,
            "time_to_first_token_s": self.stats.time_to_first_token_s,
            "tokens_per_s": self.stats.tokens_per_second,
        }


class Replies(ABC):
    """The replies to one request: tokens go in, and events of a streamed answer or a whole one come out."""

    @abstractmethod
    def begin(self) -> Iterable[Event]:
        """Return the events before the first token."""

    @abstractmethod
    def add(self, choice: int, token: Any) -> Iterable[Event]:
        """Take a token of one of the replies, and return the events that it makes."""

    @abstractmethod
    def end(self, choice: int, outcome: Outcome) -> Iterable[Event]:
        """Return the events at the end of one of the replies."""

    @abstractmethod
    def finish(self, outcomes: Sequence[Outcome]) -> Iterable[Event]:
        """Return the events after all replies."""

    @abstractmethod
    def whole(self, outcomes: Sequence[Outcome]) -> Event:
        """Return the answer that is not streamed."""

    def failed(self, error: ApiError) -> Event:
        """Return the event of an error that ends the answer."""
        return error.body


def usage_of(outcomes: Sequence[Outcome], n_choices: int, n_reasoning: int, words: tuple[str, str]) -> dict[str, Any]:
    """Return the numbers of tokens of all replies; the ``n_choices`` of one prompt have it in common.

    ``words`` are an API's for what goes in and what comes out.
    """
    of_prompts = [one.stats for one in outcomes[::n_choices]]
    prompt, reply = sum(one.prompt_tokens for one in of_prompts), sum(one.stats.tokens for one in outcomes)
    before, after = words
    return {
        f"{before}_tokens": prompt,
        f"{after}_tokens": reply,
        "total_tokens": prompt + reply,
        f"{before}_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in of_prompts)},
        f"{after}_tokens_details": {"reasoning_tokens": n_reasoning},
    }


class _Choices(Replies):
    """Replies as choices of one object; the names of objects and the prefix of ids are a subclass's."""

    whole_name: str
    chunk_name: str
    prefix: str

    def __init__(self, model_name: str, token_bytes: TokenBytes, n_choices: int, *, includes_usage: bool) -> None:
        """Keep what all objects of the request have in common; ``n_choices`` replies go on with each prompt."""
        self._token_bytes, self._n_choices, self._includes_usage = token_bytes, n_choices, includes_usage
        self._n_reasoning = 0
        self._common = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_name,
            "system_fingerprint": "overspill",
        }

    def end(self, choice: int, outcome: Outcome) -> Iterable[Event]:
        """Return the last chunk of a reply."""
        reason = {"finish_reason": self._finish_reason(choice, outcome), "overspill": outcome.to_dict()}
        return [self._chunk([{"index": choice, **self._nothing, "logprobs": None, **reason}])]

    def finish(self, outcomes: Sequence[Outcome]) -> Iterable[Event]:
        """Return the chunk with the numbers of tokens, if the client wants it."""
        return [self._chunk([], self._usage(outcomes))] if self._includes_usage else []

    def whole(self, outcomes: Sequence[Outcome]) -> Event:
        """Return all choices."""
        choices = [
            {
                **self._choice(i),
                "finish_reason": self._finish_reason(i, outcome),
                "overspill": outcome.to_dict(),
            }
            for i, outcome in enumerate(outcomes)
        ]
        return {**self._common, "object": self.whole_name, "choices": choices, "usage": self._usage(outcomes)}

    _nothing: Mapping[str, Any]
    """What the last chunk has in place of text."""

    @abstractmethod
    def _choice(self, choice: int) -> dict[str, Any]: ...

    def _finish_reason(self, choice: int, outcome: Outcome) -> str:
        return outcome.finish_reason

    def _part(self, choice: int, **parts: Any) -> Event:
        return self._chunk([{"index": choice, "logprobs": None, **parts, "finish_reason": None}])

    def _chunk(self, choices: Sequence[Event], usage: Event | None = None) -> Event:
        return {**self._common, "object": self.chunk_name, "choices": [*choices], "usage": usage}

    def _usage(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        return usage_of(outcomes, self._n_choices, self._n_reasoning, ("prompt", "completion"))


def measured_token(token: ChatToken, token_bytes: TokenBytes) -> dict[str, Any]:
    """Return a token's logarithm of its probability, and those of the likeliest ones."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(token)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": [*data]}

    return {**one(token.id, token.logprob or 0.0), "top_logprobs": [one(*other) for other in token.top_logprobs]}


def call_with_id(call: ToolCall) -> dict[str, Any]:
    """Return a call as it stands in a message; some models give none an id."""
    made = call_in_message(call)
    made["id"] = made["id"] or f"call_{uuid.uuid4().hex[:24]}"
    return made


class ChatReplies(_Choices):
    """Replies to a conversation."""

    whole_name, chunk_name, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"
    _nothing: Mapping[str, Any] = {"delta": {}}

    def __init__(self, model_name: str, token_bytes: TokenBytes, n: int, *, includes_usage: bool = False) -> None:
        """Begin ``n`` replies."""
        super().__init__(model_name, token_bytes, n, includes_usage=includes_usage)
        self._tokens: list[list[ChatToken]] = [[] for _ in range(n)]
        self._calls: list[list[dict[str, Any]]] = [[] for _ in range(n)]

    def begin(self) -> Iterable[Event]:
        """Return a chunk that says who speaks, for each reply."""
        return [self._part(i, delta={"role": "assistant", "content": ""}) for i in range(self._n_choices)]

    def add(self, choice: int, token: ChatToken) -> Iterable[Event]:
        """Take a token, and return the chunk that it makes, if it makes one."""
        self._tokens[choice].append(token)
        self._n_reasoning += token.channel is Channel.REASONING
        if token.tool_call is not None:
            call = call_with_id(token.tool_call)
            self._calls[choice].append(call)
            return [self._part(choice, delta={"tool_calls": [{"index": len(self._calls[choice]) - 1, **call}]})]
        if token.channel is Channel.REASONING:
            return [self._part(choice, delta={"reasoning_content": token.text})] if token.text else []
        if token.channel is Channel.FINAL and (token.text or token.logprob is not None):
            return [self._part(choice, delta={"content": token.text}, logprobs=self._logprobs([token]))]
        return []

    def _choice(self, choice: int) -> dict[str, Any]:
        tokens, calls = self._tokens[choice], self._calls[choice]
        text = "".join(token.text for token in tokens if token.channel is Channel.FINAL)
        reasoning = "".join(token.text for token in tokens if token.channel is Channel.REASONING)
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        final = [token for token in tokens if token.channel is Channel.FINAL]
        return {"index": choice, "message": message, "logprobs": self._logprobs(final)}

    def _finish_reason(self, choice: int, outcome: Outcome) -> str:
        return "tool_calls" if self._calls[choice] else outcome.finish_reason

    def _logprobs(self, tokens: Sequence[ChatToken]) -> dict[str, Any] | None:
        measured = [measured_token(token, self._token_bytes) for token in tokens if token.logprob is not None]
        return {"content": measured, "refusal": None} if measured else None


class TextReplies(_Choices):
    """Continuations of texts."""

    whole_name, chunk_name, prefix = "text_completion", "text_completion", "cmpl"
    _nothing: Mapping[str, Any] = {"text": ""}

    def __init__(
        self,
        model_name: str,
        token_bytes: TokenBytes,
        n_choices: int,
        echoes: Sequence[str],
        *,
        includes_usage: bool = False,
    ) -> None:
        """Begin a continuation for each text that goes before it."""
        super().__init__(model_name, token_bytes, n_choices, includes_usage=includes_usage)
        self._echoes = echoes
        self._tokens: list[list[Token]] = [[] for _ in echoes]
        self._n_characters = [len(echo) for echo in echoes]

    def begin(self) -> Iterable[Event]:
        """Return the texts that are to be repeated."""
        return [self._part(i, text=echo) for i, echo in enumerate(self._echoes) if echo]

    def add(self, choice: int, token: Token) -> Iterable[Event]:
        """Take a token, and return the chunk that it makes, if it makes one."""
        self._tokens[choice].append(token)
        offset = self._n_characters[choice]
        self._n_characters[choice] += len(token.text)
        if not token.text and token.logprob is None:
            return []
        return [self._part(choice, text=token.text, logprobs=self._logprobs([token], offset))]

    def _choice(self, choice: int) -> dict[str, Any]:
        tokens, echo = self._tokens[choice], self._echoes[choice]
        return {
            "index": choice,
            "text": echo + "".join(token.text for token in tokens),
            "logprobs": self._logprobs(tokens, len(echo)),
        }

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        if not tokens or tokens[0].logprob is None:
            return None
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        return {
            "tokens": [self._text(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self._text(one): value for one, value in token.top_logprobs} for token in tokens],
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        return self._token_bytes(token).decode(errors="replace")
