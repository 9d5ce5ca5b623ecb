"""The forms of messages that a chat template reads, found by trying: each template reads some of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import partial
from typing import Any

from overspill._core import Error
from overspill.base.cached import cached_property
from overspill.base.checks import as_text
from overspill.engine.jinja import Program, TemplateRefusalError

__all__ = ["ANY_TOOL", "MessageForms", "repaired", "try_out", "variables_of"]


def variables_of(reasoning_effort: str | None, thinking: bool) -> dict[str, Any]:
    """Return what a template is told beside the conversation; each template knows some of the names."""
    now = datetime.now()
    variables: dict[str, Any] = {
        "enable_thinking": thinking,
        "thinking": thinking,
        "date_string": now.strftime("%d %b %Y"),
        "datetime": now.strftime("%b %d %Y"),
    }
    if reasoning_effort is not None:
        as_text("reasoning_effort", reasoning_effort)
        variables |= {"reasoning_effort": reasoning_effort, "reasoning_strength": reasoning_effort}
    return variables


# --- what a template can read

_PROBE, _OTHER_PROBE = "qprobea", "qprobeb"


class MessageForms:
    """The ways in which a template reads what conversations may have, found by trying."""

    def __init__(self, program: Program, variables: Mapping[str, Any]) -> None:
        self._program, self._variables = program, variables

    def fitting(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message in the way that the template reads."""
        message = dict(message)
        if message["role"] == "developer" and "developer" not in self._program.source:
            message["role"] = "system"
        content = message.get("content")
        if isinstance(content, list) and not self._reads_parts(message["role"]):
            message["content"] = "\n".join(part["text"] for part in content)
        if isinstance(content, str) and not self._reads_text(message["role"]):
            message["content"] = [{"type": "text", "text": content}]
        if content is None and "content" in message and self._writes_none:
            message["content"] = ""
        if message.get("reasoning_content"):
            message = _REASONING[self._reasoning](message)
        if message.get("tool_calls"):
            message["tool_calls"] = [self._fitting_call(call) for call in message["tool_calls"]]
        return message

    def _fitting_call(self, call: dict[str, Any]) -> dict[str, Any]:
        arguments = call["function"]["arguments"]
        if isinstance(arguments, str) and self._reads_mappings:
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return call
        return {**call, "function": {**call["function"], "arguments": arguments}}

    def _reads_text(self, role: str) -> bool:
        if role not in ("system", "user", "assistant", "tool"):
            return True
        return not self._probed(role)[1]

    def _reads_parts(self, role: str) -> bool:
        if role not in ("system", "user", "assistant", "tool"):
            return False
        return self._probed(role)[0]

    def _probed(self, role: str) -> tuple[bool, bool]:
        """Return whether the template reads parts as it reads their text, and whether it reads parts alone."""
        if role not in self._known:
            text = self._rendered(_conversation(role, _PROBE))
            parts = self._rendered(_conversation(role, [{"type": "text", "text": _PROBE}]))
            # A template that does not know parts writes them down as they are, keys included.
            reads_parts = _PROBE in parts and parts.count("type") <= text.count("type")
            self._known[role] = reads_parts, reads_parts and _PROBE not in text
        return self._known[role]

    @cached_property
    def _known(self) -> dict[str, tuple[bool, bool]]:
        return {}

    @cached_property
    def _writes_none(self) -> bool:
        without, empty = _conversation("tool", _PROBE), _conversation("tool", _PROBE)
        without[1]["content"] = None
        return self._rendered(without).count("None") > self._rendered(empty).count("None")

    @cached_property
    def _reads_mappings(self) -> bool:
        """Whether it writes arguments in a form of its own, or as JSON, if it gets a mapping."""
        call = _conversation("tool", _PROBE)
        call[1]["tool_calls"][0]["function"]["arguments"] = {_OTHER_PROBE: 1}
        text = self._rendered(call)
        return _OTHER_PROBE in text and f"{{'{_OTHER_PROBE}'" not in text

    @cached_property
    def _reasoning(self) -> str:
        """The way in which the template reads reasoning; as it is given, if in none."""
        called = _conversation("tool", "x")
        called[1] |= {"reasoning_content": _PROBE}
        answered = _conversation("assistant", _OTHER_PROBE)[:2]
        answered[1] |= {"reasoning_content": _PROBE}
        for way, given in _REASONING.items():
            texts = [self._rendered([*map(given, said)]) for said in ([dict(m) for m in called], answered)]
            is_read = any(_PROBE in text for text in texts) and _OTHER_PROBE in texts[1]
            if is_read and not any(re.search(f"thinking['\"]: *['\"]{_PROBE}", text) for text in texts):
                return way
        return "reasoning_content"

    def _rendered(self, messages: list[dict[str, Any]]) -> str:
        variables = {**self._variables, **variables_of(None, True), "tools": [], "functions": "[]"}
        try:
            return self._program.render({**variables, "messages": messages, "add_generation_prompt": False}, 0)
        except (TemplateRefusalError, Error):
            return ""


def _conversation(role: str, content: object) -> list[dict[str, Any]]:
    """Return a conversation whose message of a role has a content."""
    call = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": {"x": 1}}}
    question = {"role": "user", "content": "x"}
    conversations: dict[str, list[dict[str, Any]]] = {
        "system": [{"role": "system", "content": content}, question],
        "user": [{"role": "user", "content": content}],
        "assistant": [question, {"role": "assistant", "content": content}, question],
        "tool": [
            question,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "abcdefghi", "name": "f", "content": content},
        ],
    }
    return conversations[role]


ANY_TOOL = {"type": "function", "function": {"name": "f", "description": "x", "parameters": {"properties": {"x": {}}}}}


def try_out(program: Program, variables: Mapping[str, Any]) -> None:
    """Render a few conversations; an Error if the template uses up too much."""
    everything = {**variables, **variables_of("low", True)}
    for role in ("system", "user", "assistant", "tool"):
        for add_generation_prompt in (True, False):
            try:
                program.render(
                    {
                        **everything,
                        "messages": _conversation(role, "x"),
                        "add_generation_prompt": add_generation_prompt,
                    },
                    0,
                )
            except TemplateRefusalError:
                continue


def _with_reasoning_as(key: str, message: dict[str, Any]) -> dict[str, Any]:
    return {**message, key: message["reasoning_content"]} if "reasoning_content" in message else message


def _with_thinking_part(message: dict[str, Any]) -> dict[str, Any]:
    if "reasoning_content" not in message:
        return message
    content = message.get("content") or []
    said = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {**message, "content": [{"type": "thinking", "thinking": message["reasoning_content"]}, *said]}


# Ways to give a message's reasoning to a template.
_REASONING: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "reasoning_content": lambda message: message,
    "thinking": partial(_with_reasoning_as, "thinking"),
    "reasoning": partial(_with_reasoning_as, "reasoning"),
    "part": _with_thinking_part,
}


def repaired(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages, and then what says the same to templates that refuse them."""
    yield messages
    # gpt-oss takes either reasoning or content beside a call; Jinja cannot add None to a text.
    changed = [dict(message) for message in messages]
    for message in changed:
        if message.get("tool_calls"):
            content = message.get("content") or ""
            if message.get("thinking") and content and isinstance(content, str):
                message |= {"thinking": f"{message['thinking']}\n\n{content}"}
                content = ""
            message["content"] = content
    if changed != messages:
        yield changed
    # Some know no system message.
    told = changed
    if len(changed) > 1 and changed[0]["role"] == "system":
        first, second = changed[0]["content"], changed[1].get("content")
        if isinstance(first, str) and isinstance(second, str):
            told = [{**changed[1], "content": f"{first}\n{second}"}, *changed[2:]]
            yield told
    # Some know arguments as JSON only.
    calls = [{**m, "tool_calls": [*map(_call_as_json, m["tool_calls"])]} if m.get("tool_calls") else m for m in told]
    if calls != told:
        yield calls


def _call_as_json(call: dict[str, Any]) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    if isinstance(arguments, str):
        return call
    return {**call, "function": {**call["function"], "arguments": json.dumps(arguments, ensure_ascii=False)}}
