"""Run language models bigger than your GPU, at the speed the hardware allows.

>>> import overspill
>>> model = overspill.Model("model.gguf")
>>> for token in model.stream("Why is the sky blue?", max_tokens=64):
...     print(token, end="", flush=True)

Our log goes to ``logging.getLogger("overspill")``: a line or two at INFO as a model is loaded. llama.cpp's goes to
``"overspill.llama"``. What llama.cpp calls INFO, over 100 lines for each model, is DEBUG there, unless that logger is
given a level of its own.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import version
from pathlib import Path

if sys.platform == "win32":
    # Windows has no search path within a library, so it is told the folder of llama.cpp's.
    os.add_dll_directory(str(Path(__file__).parent / "lib"))

try:
    from overspill import _core
except ImportError as error:
    if "libcu" not in str(error):
        raise
    raise ImportError(
        f"{error}: this CUDA build needs CUDA's libraries: install the toolkit that it was built with, "
        "or pip install nvidia-cublas nvidia-cuda-runtime of its version"
    ) from error

from overspill._core import (
    CancelledError,
    ClosedError,
    ContextFullError,
    Error,
    ModelLoadError,
    OutOfMemoryError,
    UnusableError,
)
from overspill.base.values import (
    Breakdown,
    Completion,
    Device,
    ExpertStats,
    LogitsProcessor,
    MemoryUse,
    Stats,
    StopReason,
    Token,
    TokenChooser,
    TokenMask,
)
from overspill.cascade.cascade import Cascade
from overspill.cascade.signals import Draft, Judgement, mean_entropy, mean_logprob
from overspill.cascade.stream import CascadeStats, CascadeStream, CascadeToken
from overspill.engine.async_stream import AsyncChatStream, AsyncStream
from overspill.engine.conversation import Chat
from overspill.engine.model import Model
from overspill.engine.reply import Channel, ChatReply, ChatStream, ChatToken, ToolCall
from overspill.engine.stream import Stream
from overspill.engine.template import ChatTemplate
from overspill.header.info import ModelInfo
from overspill.machine.devices import add_rpc_server, devices
from overspill.machine.hardware import DeviceSpec, Hardware
from overspill.placement.llama import LlamaPlacement
from overspill.placement.placement import Placement
from overspill.planning.expert_cache import ExpertCachePlan, plan_expert_cache
from overspill.planning.forecast import Forecast, forecast
from overspill.planning.plan import Plan, plan
from overspill.planning.residency import ExpertForecast
from overspill.planning.ubatch import ubatch_trade
from overspill.planning.verdict import Verdict
from overspill.sampling.options import SamplingOptions
from overspill.sampling.sampler import Sampler
from overspill.studies.bench.measure import bench
from overspill.studies.bench.result import Bench
from overspill.studies.compare.answers import Answer, ComparedModel
from overspill.studies.compare.comparison import Comparison
from overspill.studies.compare.run import compare
from overspill.studies.experts.run import trace_experts
from overspill.studies.experts.study import ExpertStudy, replay_experts
from overspill.studies.experts.trace import ExpertReplay, ExpertTrace
from overspill.studies.tune import Trial, Tuned, tune

__all__ = [
    "Answer",
    "AsyncChatStream",
    "AsyncStream",
    "Bench",
    "Breakdown",
    "CancelledError",
    "Cascade",
    "CascadeStats",
    "CascadeStream",
    "CascadeToken",
    "Channel",
    "Chat",
    "ChatReply",
    "ChatStream",
    "ChatTemplate",
    "ChatToken",
    "ClosedError",
    "ComparedModel",
    "Comparison",
    "Completion",
    "ContextFullError",
    "Device",
    "DeviceSpec",
    "Draft",
    "Error",
    "ExpertCachePlan",
    "ExpertForecast",
    "ExpertReplay",
    "ExpertStats",
    "ExpertStudy",
    "ExpertTrace",
    "Forecast",
    "Hardware",
    "Judgement",
    "LlamaPlacement",
    "LogitsProcessor",
    "MemoryUse",
    "Model",
    "ModelInfo",
    "ModelLoadError",
    "OutOfMemoryError",
    "Placement",
    "Plan",
    "Sampler",
    "SamplingOptions",
    "Stats",
    "StopReason",
    "Stream",
    "Token",
    "TokenChooser",
    "TokenMask",
    "ToolCall",
    "Trial",
    "Tuned",
    "UnusableError",
    "Verdict",
    "add_rpc_server",
    "bench",
    "compare",
    "devices",
    "forecast",
    "mean_entropy",
    "mean_logprob",
    "plan",
    "plan_expert_cache",
    "replay_experts",
    "trace_experts",
    "tune",
    "ubatch_trade",
]

__version__ = version("overspill")


def _call_details_debug(record: logging.LogRecord) -> bool:
    """Make llama.cpp's INFO lines DEBUG, and tell whether they are wanted, where its logger has no level of its own."""
    if record.levelno != logging.INFO or _llama_log.level != logging.NOTSET:
        return True
    record.levelno, record.levelname = logging.DEBUG, logging.getLevelName(logging.DEBUG)
    return _llama_log.isEnabledFor(logging.DEBUG)


_llama_log = logging.getLogger("overspill.llama")
_llama_log.addFilter(_call_details_debug)
# Without a handler of the program's own, Python shows our warnings; llama.cpp's are too many.
_llama_log.addHandler(logging.NullHandler())
_core.load_backends(str(Path(_core.__file__).parent / "lib"))
