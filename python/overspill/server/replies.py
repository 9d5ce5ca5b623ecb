"""Replies in the form of OpenAI's API: whole ones, and the chunks of streamed ones."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from overspill.base.values import Stats, StopReason, Token
from overspill.engine.model import Model
from overspill.engine.reply import Channel, ChatToken, call_in_message

__all__ = ["ChatReplies", "Replies", "TextReplies"]


class Replies:
    """The replies to one request; the names of objects and the prefix of ids are a subclass's."""

    whole_name: str
    chunk_name: str
    prefix: str

    def __init__(self, model_name: str, model: Model, n_choices: int) -> None:
        """Keep what all objects of the request have in common; ``n_choices`` replies go on with each prompt."""
        self._model, self._n_choices = model, n_choices
        self._common = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_name,
            "system_fingerprint": "overspill",
        }

    def chunk(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return a part of a streamed answer."""
        return {**self._common, "object": self.chunk_name, "choices": [*choices], "usage": usage}

    def whole(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, Any]) -> dict[str, Any]:
        """Return a whole answer."""
        return {**self._common, "object": self.whole_name, "choices": [*choices], "usage": usage}

    def usage(self, stats: Sequence[Stats], n_reasoning: int = 0) -> dict[str, Any]:
        """Return the numbers of tokens of all replies; the choices of one prompt have it in common."""
        of_prompts = stats[:: self._n_choices]
        prompt, reply = sum(one.prompt_tokens for one in of_prompts), sum(one.tokens for one in stats)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": reply,
            "total_tokens": prompt + reply,
            "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in of_prompts)},
            "completion_tokens_details": {"reasoning_tokens": n_reasoning},
        }

    def _bytes(self, token: int) -> bytes:
        return self._model.token_bytes(token)


def _finish_reason(stats: Stats) -> str:
    return "length" if stats.stop_reason in (StopReason.MAX_TOKENS, StopReason.CONTEXT_FULL) else "stop"


class ChatReplies(Replies):
    """Replies to a conversation."""

    whole_name, chunk_name, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, model_name: str, model: Model, n: int) -> None:
        """Begin ``n`` replies."""
        super().__init__(model_name, model, n)
        self._tokens: list[list[ChatToken]] = [[] for _ in range(n)]
        self._calls: list[list[dict[str, Any]]] = [[] for _ in range(n)]

    @staticmethod
    def beginning(choice: int) -> dict[str, Any]:
        """Return the first choice of a streamed reply."""
        return {"index": choice, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def add(self, choice: int, token: ChatToken) -> dict[str, Any] | None:
        """Take a token, and return the choice of the chunk that it makes; None if it makes none."""
        self._tokens[choice].append(token)
        delta: dict[str, Any] = {}
        if token.tool_call is not None:
            call = call_in_message(token.tool_call)
            call["id"] = call["id"] or f"call_{uuid.uuid4().hex[:24]}"  # some models give none
            self._calls[choice].append(call)
            delta["tool_calls"] = [{"index": len(self._calls[choice]) - 1, **call}]
        elif token.text and token.channel is Channel.REASONING:
            delta["reasoning_content"] = token.text
        elif token.channel is Channel.FINAL and (token.text or token.logprob is not None):
            delta["content"] = token.text
        if not delta:
            return None
        logprobs = self._logprobs([token]) if token.logprob is not None and "content" in delta else None
        return {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def end(self, choice: int, stats: Stats) -> dict[str, Any]:
        """Return the last choice of a streamed reply."""
        return {"index": choice, "delta": {}, "finish_reason": self._finish_reason(choice, stats)}

    def choice(self, choice: int, stats: Stats) -> dict[str, Any]:
        """Return the choice of a whole reply."""
        tokens, calls = self._tokens[choice], self._calls[choice]
        text = "".join(token.text for token in tokens if token.channel is Channel.FINAL)
        reasoning = "".join(token.text for token in tokens if token.channel is Channel.REASONING)
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        measured = [token for token in tokens if token.logprob is not None and token.channel is Channel.FINAL]
        return {
            "index": choice,
            "message": message,
            "logprobs": self._logprobs(measured) if measured else None,
            "finish_reason": self._finish_reason(choice, stats),
        }

    def usage(self, stats: Sequence[Stats], n_reasoning: int = 0) -> dict[str, Any]:
        """Return the numbers of tokens of all replies."""
        n_reasoning = sum(token.channel is Channel.REASONING for tokens in self._tokens for token in tokens)
        return super().usage(stats, n_reasoning)

    def _finish_reason(self, choice: int, stats: Stats) -> str:
        return "tool_calls" if self._calls[choice] else _finish_reason(stats)

    def _logprobs(self, tokens: Sequence[ChatToken]) -> dict[str, Any]:
        return {"content": [self._measured(token) for token in tokens], "refusal": None}

    def _measured(self, token: ChatToken) -> dict[str, Any]:
        return {
            **self._one(token.id, token.logprob or 0.0),
            "top_logprobs": [self._one(*other) for other in token.top_logprobs],
        }

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._bytes(token)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": [*data]}


class TextReplies(Replies):
    """Continuations of texts."""

    whole_name, chunk_name, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, model_name: str, model: Model, n_choices: int, echoes: Sequence[str]) -> None:
        """Begin a continuation for each text that goes before it."""
        super().__init__(model_name, model, n_choices)
        self._echoes = echoes
        self._tokens: list[list[Token]] = [[] for _ in echoes]
        self._n_characters = [len(echo) for echo in echoes]

    def beginning(self, choice: int) -> dict[str, Any] | None:
        """Return the first choice of a streamed reply, if there is something to say."""
        if not self._echoes[choice]:
            return None
        return {"index": choice, "text": self._echoes[choice], "logprobs": None, "finish_reason": None}

    def add(self, choice: int, token: Token) -> dict[str, Any] | None:
        """Take a token, and return the choice of the chunk that it makes; None if it makes none."""
        self._tokens[choice].append(token)
        offset = self._n_characters[choice]
        self._n_characters[choice] += len(token.text)
        if not token.text and token.logprob is None:
            return None
        logprobs = self._logprobs([token], offset) if token.logprob is not None else None
        return {"index": choice, "text": token.text, "logprobs": logprobs, "finish_reason": None}

    def end(self, choice: int, stats: Stats) -> dict[str, Any]:
        """Return the last choice of a streamed reply."""
        return {"index": choice, "text": "", "logprobs": None, "finish_reason": _finish_reason(stats)}

    def choice(self, choice: int, stats: Stats) -> dict[str, Any]:
        """Return the choice of a whole reply."""
        tokens = self._tokens[choice]
        measured = [token for token in tokens if token.logprob is not None]
        return {
            "index": choice,
            "text": self._echoes[choice] + "".join(token.text for token in tokens),
            "logprobs": self._logprobs(measured, len(self._echoes[choice])) if measured else None,
            "finish_reason": _finish_reason(stats),
        }

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
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
        return self._bytes(token).decode(errors="replace")
