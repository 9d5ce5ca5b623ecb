"""Requests as OpenAI's API has them. Fields that nothing here knows are ignored, as clients expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "Call",
    "ChatRequest",
    "CompletionRequest",
    "Fields",
    "Function",
    "JsonSchema",
    "Message",
    "NamedTool",
    "Part",
    "ResponseFormat",
    "SamplingRequest",
]

_SEEDS = 2**32 - 1
MOST_CHOICES = 16

Choices: TypeAlias = Annotated[int, Field(ge=1, le=MOST_CHOICES)]


class Fields(BaseModel):
    """Fields of a request, of which unknown ones are ignored."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class Function(Fields):
    """The name and arguments of a call, or the name alone of a tool that is to be called."""

    name: str
    arguments: str = "{}"


class Call(Fields):
    """A call of a tool in a message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class Part(Fields):
    """A part of a message."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Message(Fields):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None

    def for_model(self) -> dict[str, Any]:
        """Return the message as :meth:`overspill.Model.chat` takes it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if isinstance(self.content, list):
            message["content"] = [_text_part(part) for part in self.content]
        for key in ("name", "reasoning_content", "tool_call_id"):
            if (value := getattr(self, key)) is not None:
                message[key] = value
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude_none=True) for call in self.tool_calls]
        return message


def _text_part(part: Part) -> dict[str, str]:
    text = part.text if part.type in ("text", "input_text", "output_text") else part.refusal
    if text is None:
        raise ValueError(f"the content of a message must be text, not {part.type!r:.40}")
    return {"type": "text", "text": text}


class StreamOptions(Fields):
    """Options of a streamed answer."""

    include_usage: bool = False


class SamplingRequest(Fields):
    """What all requests for a text have."""

    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Choices | None = None
    stop: str | list[str] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    repeat_penalty: float | None = Field(None, gt=0, le=100)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)

    @property
    def n_choices(self) -> int:
        """How many answers are wanted."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """Whether a streamed answer ends with the numbers of its tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def ids_in(self) -> str:
        """The field with token ids, which are one model's own; empty if there is none."""
        return "logit_bias" if self.logit_bias else ""

    def sampling(self, choice: int) -> dict[str, Any]:
        """Return the options of one of the answers, as :meth:`overspill.Model.stream` takes them."""
        names = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "frequency_penalty", "presence_penalty")
        options = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.frequency_penalty or self.presence_penalty:
            options["repeat_last_n"] = -1  # OpenAI's look at the whole text
        if self.logit_bias:
            try:
                options["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
            except ValueError:
                raise ValueError("logit_bias: the keys must be token ids") from None
        if self.seed is not None:
            options["seed"] = (self.seed + choice) % _SEEDS
        if self.stop:
            options["stop"] = self.stop
        return options


class JsonSchema(Fields):
    """A schema that the answer has to fit."""

    name: str = ""
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(Fields):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def schema_of_answer(self) -> Mapping[str, Any] | None:
        """The JSON schema of the answer; None for any text."""
        if self.type == "json_schema":
            if self.json_schema is None or self.json_schema.schema_ is None:
                raise ValueError("the form of the answer has no JSON schema: its field schema is missing")
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class NamedTool(Fields):
    """The one tool that is to be called."""

    type: Literal["function"]
    function: Function


class ChatRequest(SamplingRequest):
    """A request for a reply to a conversation."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "required", "none"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None

    @property
    def takes_one_call(self) -> bool:
        """Whether a reply calls one tool at most."""
        return self.parallel_tool_calls is False or isinstance(self.tool_choice, NamedTool)

    def options(self, choice: int) -> dict[str, Any]:
        """Return the options of one of the replies, as :meth:`overspill.Model.chat` takes them."""
        options = self.sampling(choice)
        options["max_tokens"] = self.max_completion_tokens or self.max_tokens
        if self.logprobs:
            options["logprobs"] = self.top_logprobs or True
        if self.response_format is not None:
            options["json_schema"] = self.response_format.schema_of_answer
        if self.reasoning_effort in ("none", "minimal"):
            options["thinking"] = False
        elif self.reasoning_effort is not None:
            options["reasoning_effort"] = "high" if self.reasoning_effort == "xhigh" else self.reasoning_effort
        if self.tools:
            options["tools"], options["tool_choice"] = self._tools(self.tools)
        return options

    def _tools(self, tools: Sequence[dict[str, Any]]) -> tuple[Sequence[dict[str, Any]], str]:
        if not isinstance(self.tool_choice, NamedTool):
            return tools, self.tool_choice or "auto"
        name = self.tool_choice.function.name
        named = [tool for tool in tools if isinstance(one := tool.get("function"), dict) and one.get("name") == name]
        if not named:
            raise ValueError(f"tool_choice: there is no tool {name!r:.80}")
        return named, "required"


class CompletionRequest(SamplingRequest):
    """A request for the continuation of texts."""

    prompt: str | list[str] | list[int] | list[list[int]] = ""
    max_tokens: int | None = Field(16, ge=0, le=2**31 - 1)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    suffix: str | None = None

    @property
    def ids_in(self) -> str:
        """The field with token ids, which are one model's own; empty if there is none."""
        return super().ids_in or ("" if all(isinstance(prompt, str) for prompt in self.prompts) else "prompt")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The texts or token ids to continue."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        texts = [part for part in self.prompt if not isinstance(part, int)]
        ids = [part for part in self.prompt if isinstance(part, int)]
        return [ids] if ids or not texts else [*texts]

    def options(self, choice: int) -> dict[str, Any]:
        """Return the options of one of the continuations, as :meth:`overspill.Model.stream` takes them."""
        if self.suffix:
            raise ValueError("suffix: no model here fills in the middle")
        options = self.sampling(choice)
        options["max_tokens"] = self.max_tokens
        if self.logprobs is not None:
            options["logprobs"] = self.logprobs or True
        return options
