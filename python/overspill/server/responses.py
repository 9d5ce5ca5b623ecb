"""The Responses API: its requests, as those for a reply to a conversation, and the items and events of its answers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from overspill.engine.reply import Channel, ChatToken
from overspill.server.errors import ApiError
from overspill.server.replies import Event, Outcome, Replies, TokenBytes, call_with_id, measured_token, usage_of
from overspill.server.requests import (
    Call,
    ChatRequest,
    Fields,
    Function,
    JsonSchema,
    Message,
    NamedTool,
    Part,
    ResponseFormat,
    SamplingRequest,
)

__all__ = ["ResponseReplies", "ResponsesRequest"]


class Format(JsonSchema):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"] = "text"


class Text(Fields):
    """What the answer's text is like."""

    format: Format | None = None


class Reasoning(Fields):
    """How much the model reasons."""

    effort: str | None = None


class ToolChoice(Fields):
    """The one tool that is to be called."""

    type: Literal["function"]
    name: str

    @property
    def named(self) -> NamedTool:
        """The tool as a request for a reply names it."""
        return NamedTool(type="function", function=Function(name=self.name))


class Item(Fields):
    """A message, a call of a tool, the answer to a call, or reasoning."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[Part] | None = None
    summary: list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str = "{}"
    output: str | list[Part] | None = None

    @property
    def reasoning(self) -> str:
        """The text of reasoning."""
        parts = self.content if isinstance(self.content, list) else self.summary
        return "".join(part.text or "" for part in parts or self.summary or ())


class ResponsesRequest(SamplingRequest):
    """A request for an answer to a conversation, all of which it has."""

    input: str | list[Item] = Field(min_length=1)
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    include: list[str] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    text: Text | None = None
    reasoning: Reasoning | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "required", "none"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    background: bool | None = None

    def for_chat(self) -> ChatRequest:
        """Return it as a request for a reply."""
        for name in ("previous_response_id", "conversation"):
            if getattr(self, name):
                raise ValueError(f"{name}: this server keeps no responses; send the whole conversation as input")
        if self.background:
            raise ValueError("background: this server answers at once, or streams")
        wants_logprobs = self.top_logprobs is not None or "message.output_text.logprobs" in (self.include or ())
        form = self.text.format if self.text is not None else None
        choice = self.tool_choice
        return ChatRequest(
            **{name: getattr(self, name) for name in SamplingRequest.model_fields if name != "n"},
            messages=self._messages(),
            max_completion_tokens=self.max_output_tokens,
            logprobs=wants_logprobs,
            top_logprobs=self.top_logprobs,
            response_format=None if form is None else ResponseFormat(type=form.type, json_schema=form),
            tools=None if self.tools is None else [_tool(i, tool) for i, tool in enumerate(self.tools)],
            parallel_tool_calls=self.parallel_tool_calls,
            tool_choice=choice.named if isinstance(choice, ToolChoice) else choice,
            reasoning_effort=None if self.reasoning is None else self.reasoning.effort,
        )

    def _messages(self) -> list[Message]:
        made = [Message(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return [*made, Message(role="user", content=self.input)]
        reasoning: str | None = None
        for i, item in enumerate(self.input):
            match item.type:
                case "reasoning":
                    reasoning = item.reasoning or None
                case "message" if item.role is not None:
                    reasoned = reasoning if item.role == "assistant" else None
                    made.append(Message(role=item.role, content=item.content, reasoning_content=reasoned))
                    reasoning = None
                case "function_call" if item.name is not None:
                    call = Call(id=item.call_id, function=Function(name=item.name, arguments=item.arguments))
                    if not made or made[-1].role != "assistant" or reasoning is not None:
                        made.append(Message(role="assistant", reasoning_content=reasoning, tool_calls=[]))
                        reasoning = None
                    made[-1].tool_calls = [*(made[-1].tool_calls or ()), call]
                case "function_call_output":
                    made.append(Message(role="tool", content=item.output, tool_call_id=item.call_id))
                case "message" | "function_call":
                    raise ValueError(f"input.{i}: {'role' if item.type == 'message' else 'name'} is missing")
                case _:
                    raise ValueError(f"input.{i}: items of the type {item.type!r:.40} are not known here")
        if not made:
            raise ValueError("input: there is no message")
        return made

    def repeated(self) -> dict[str, Any]:
        """Return what an answer repeats of its request."""
        given = self.model_dump(by_alias=True)
        names = ("instructions", "max_output_tokens", "metadata", "reasoning", "temperature", "top_p", "top_logprobs")
        return {
            **{name: given[name] for name in names},
            "parallel_tool_calls": given["parallel_tool_calls"] is not False,
            "text": {"format": (given["text"] or {}).get("format") or {"type": "text"}},
            "tool_choice": given["tool_choice"] or "auto",
            "tools": given["tools"] or [],
        }


def _tool(i: int, tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool as a request for a reply has it."""
    if tool.get("type") != "function":
        raise ValueError(f"tools.{i}: only functions can be called here, not {tool.get('type')!r:.40}")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


class _OpenItem:
    """The item whose text is coming: a message or reasoning."""

    def __init__(self, is_message: bool) -> None:
        self.is_message = is_message
        self.id = _new_id("msg" if is_message else "rs")
        self.kind = "output_text" if is_message else "reasoning_text"
        self.texts: list[str] = []
        self.logprobs: list[Mapping[str, Any]] = []

    @property
    def part(self) -> dict[str, Any]:
        """The one part of its content."""
        more = {"annotations": [], "logprobs": [*self.logprobs]} if self.is_message else {}
        return {"type": self.kind, "text": "".join(self.texts), **more}

    def with_content(self, status: str, *content: Mapping[str, Any]) -> dict[str, Any]:
        """Return the item."""
        more = {"type": "message", "role": "assistant"} if self.is_message else {"type": "reasoning", "summary": []}
        return {"id": self.id, **more, "status": status, "content": [*content]}


class ResponseReplies(Replies):
    """The one reply to a request, as items: reasoning, messages and calls, in the order in which they come."""

    def __init__(self, model_name: str, token_bytes: TokenBytes, request: ResponsesRequest) -> None:
        """Begin the reply."""
        self._token_bytes = token_bytes
        self._common = {
            "id": _new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "model": model_name,
            **request.repeated(),
        }
        self._items: list[Mapping[str, Any]] = []
        self._open: _OpenItem | None = None
        self._n_reasoning = self._n_events = 0

    def begin(self) -> Iterable[Event]:
        """Return the events that say that the request is being answered."""
        states = ("created", "in_progress")
        return [self._event(f"response.{state}", response=self._response("in_progress")) for state in states]

    def add(self, choice: int, token: ChatToken) -> Iterable[Event]:
        """Take a token, and return the events that it makes."""
        self._n_reasoning += token.channel is Channel.REASONING
        if token.tool_call is not None:
            call = call_with_id(token.tool_call)
            return [*self._ended(), *self._called(call["id"], **call["function"])]
        measured = [] if token.logprob is None else [measured_token(token, self._token_bytes)]
        if token.channel is Channel.REASONING:
            return self._texts(token.text, [], is_message=False) if token.text else []
        # A special token at the end begins no message, but has a logprob in one.
        is_in_message = self._open is not None and self._open.is_message
        if token.channel is Channel.FINAL and (token.text or (measured and is_in_message)):
            return self._texts(token.text, measured, is_message=True)
        return []

    def end(self, choice: int, outcome: Outcome) -> Iterable[Event]:
        """Return the events that end the last item; a reply without any has an empty message."""
        empty = [] if self._items or self._open is not None else self._texts("", [], is_message=True)
        return [*empty, *self._ended("incomplete" if outcome.is_cut_off else "completed")]

    def finish(self, outcomes: Sequence[Outcome]) -> Iterable[Event]:
        """Return the event with the whole answer."""
        whole = self.whole(outcomes)
        return [self._event(f"response.{whole['status']}", response=whole)]

    def whole(self, outcomes: Sequence[Outcome]) -> Event:
        """Return the answer."""
        (outcome,) = outcomes
        return {
            **self._response("incomplete" if outcome.is_cut_off else "completed"),
            "incomplete_details": {"reason": "max_output_tokens"} if outcome.is_cut_off else None,
            "usage": usage_of(outcomes, 1, self._n_reasoning, ("input", "output")),
            "overspill": outcome.to_dict(),
        }

    def failed(self, error: ApiError) -> Event:
        """Return the event of an error that ends the answer."""
        body = error.body["error"]
        return self._event("error", error=body, **{name: body[name] for name in ("code", "message", "param")})

    def _response(self, status: str) -> dict[str, Any]:
        return {**self._common, "status": status, "error": None, "output": [*self._items]}

    def _event(self, kind: str, **fields: Any) -> Event:
        self._n_events += 1
        return {"type": kind, "sequence_number": self._n_events - 1, **fields}

    def _of_item(self, kind: str, **fields: Any) -> Event:
        """Return an event about the item that comes after those that are done."""
        return self._event(f"response.{kind}", output_index=len(self._items), **fields)

    def _texts(self, text: str, measured: Sequence[Mapping[str, Any]], *, is_message: bool) -> Sequence[Event]:
        """Add text to the open item, or to a new one if that is of the other kind."""
        events: list[Event] = []
        if self._open is None or self._open.is_message != is_message:
            events += self._ended()
            self._open = new = _OpenItem(is_message)
            events.append(self._of_item("output_item.added", item=new.with_content("in_progress")))
            events.append(self._of_item("content_part.added", item_id=new.id, content_index=0, part=new.part))
        one = self._open
        one.texts.append(text)
        one.logprobs.extend(measured)
        more = {"logprobs": measured} if is_message else {}
        events.append(self._of_item(f"{one.kind}.delta", item_id=one.id, content_index=0, delta=text, **more))
        return events

    def _ended(self, status: str = "completed") -> Sequence[Event]:
        """End the open item, if there is one."""
        one, self._open = self._open, None
        if one is None:
            return []
        part, place = one.part, {"item_id": one.id, "content_index": 0}
        item = one.with_content(status, part)
        done = {name: part[name] for name in ("text", "logprobs") if name in part}
        events = [
            self._of_item(f"{one.kind}.done", **place, **done),
            self._of_item("content_part.done", **place, part=part),
            self._of_item("output_item.done", item=item),
        ]
        self._items.append(item)
        return events

    def _called(self, call_id: str, name: str, arguments: str) -> Sequence[Event]:
        """Add a call of a tool."""
        item = {"id": _new_id("fc"), "type": "function_call", "call_id": call_id, "name": name}
        called = {**item, "arguments": arguments, "status": "completed"}
        events = [
            self._of_item("output_item.added", item={**item, "arguments": "", "status": "in_progress"}),
            self._of_item("function_call_arguments.delta", item_id=item["id"], delta=arguments),
            self._of_item("function_call_arguments.done", item_id=item["id"], name=name, arguments=arguments),
            self._of_item("output_item.done", item=called),
        ]
        self._items.append(called)
        return events


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
