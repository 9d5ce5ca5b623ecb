"""The options of replies as keywords, so that type checkers find those that there are not."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from overspill.base.values import LogitsProcessor, TokenChooser, TokenMask
from overspill.engine.template import OnFull, ToolChoice
from overspill.engine.tools import Tool
from overspill.sampling.options import SamplingKeywords, SamplingOptions
from overspill.sampling.sampler import Sampler

__all__ = ["CHAT_KEYWORDS", "STREAM_KEYWORDS", "ChatKeywords", "ReplyKeywords", "StreamKeywords"]


class ReplyKeywords(SamplingKeywords, total=False):
    """Options of every reply; :meth:`Model.stream` says what they do."""

    max_tokens: int | None
    stop: str | Sequence[str]
    sampling: SamplingOptions | None
    sampler: Sampler | TokenChooser | None
    logits_processors: Sequence[LogitsProcessor]
    grammar: str | TokenMask | None
    logits: bool
    logprobs: bool | int
    session: str | os.PathLike[str] | None


class StreamKeywords(ReplyKeywords, total=False):
    """Options of replies that continue a text; :meth:`Model.stream` says what they do."""

    json_schema: str | Mapping[str, Any] | bool | None
    reuse: bool
    special: bool


class ChatKeywords(ReplyKeywords, total=False):
    """Options of replies to messages; :meth:`Model.chat` says what they do."""

    json_schema: str | Mapping[str, Any] | bool | None
    tools: Sequence[Tool] | None
    tool_choice: ToolChoice
    reasoning_effort: str | None
    thinking: bool
    on_full: OnFull


STREAM_KEYWORDS = StreamKeywords.__optional_keys__
CHAT_KEYWORDS = ChatKeywords.__optional_keys__
