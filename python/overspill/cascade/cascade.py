"""The pair of a small and a large model: loading both within a budget, and opening replies."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from overspill._core import ClosedError, Error, Origin, OutOfMemoryError
from overspill.base.checks import as_flag, as_path, as_text, check_keywords, naming, shown
from overspill.base.text import short_repr
from overspill.base.units import parse_memory
from overspill.cascade.budget import fit_together
from overspill.cascade.signals import Escalation, mean_logprob
from overspill.cascade.stream import CascadeStream, Which
from overspill.engine.arguments import check_for_any_model
from overspill.engine.keywords import CHAT_KEYWORDS, STREAM_KEYWORDS
from overspill.engine.model import LOAD_KEYWORDS, Model
from overspill.engine.reply import ChatStream
from overspill.engine.stream import Stream
from overspill.engine.template import Message
from overspill.header.info import ModelInfo
from overspill.hub import resolve
from overspill.machine.devices import add_rpc_servers, by_device, devices, devices_for_layers
from overspill.machine.hardware import Hardware

__all__ = ["CASCADE", "Cascade"]

CASCADE = "cascade:"
"""What the name of a pair of models begins with."""

_BOTH: tuple[Which, Which] = ("small", "large")


class Cascade:
    """A small model that answers, and a large one that is asked where the small one fails.

    >>> cascade = overspill.Cascade("gpt-oss-20b.gguf", "gpt-oss-120b.gguf", overspill.mean_logprob(below=-1.0))
    >>> with cascade.chat("Why is the sky blue?") as reply:
    ...     for token in reply:
    ...         print(token, end="", flush=True)
    >>> print(reply.stats)  # who answered and why, and how fast

    The small model's reply is held back until it has been judged, and then comes out all at once. So the tokens are
    those of one answer, and code for ``model.chat`` works here too: it never joins half an answer with another one.
    With ``show_draft=True`` the small model's tokens come out as they are made. If the large model is asked then, its
    first token has :attr:`CascadeToken.restarted`. :attr:`CascadeStream.draft` keeps the small model's reply in both
    cases.

    Parameters
    ----------
    small, large
        GGUF files, as :class:`Model` takes them, or loaded models. The cascade closes those that it loaded.
    escalate
        When the large model is asked: :func:`mean_logprob`, :func:`mean_entropy`, or a function of yours, which takes a
        :class:`Draft` and returns ``True``, ``False`` or a reason in words. Of a sequence of these, one is enough.
        Default: ``mean_logprob()``.
    memory
        Bytes of each device's memory for both models together, as in ``{"gpu": "20GiB", "cpu": "100GiB"}``.
        Default: the free memory. Two files are both loaded if forecasts say that there is room for both. Otherwise one
        at a time is: the small one is closed when the large one is asked, and loaded again for the next question.
        :attr:`budget` says which and why.
    **options
        Those of :class:`Model`, for both files.

    Raises
    ------
    ModelLoadError, OutOfMemoryError, Error, ValueError, TypeError
        As for :class:`Model`. Errors in the large file's header come at once, even if it is loaded later.
    """

    def __init__(
        self,
        small: str | os.PathLike[str] | Model,
        large: str | os.PathLike[str] | Model,
        escalate: Escalation | Sequence[Escalation] | None = None,
        *,
        memory: Mapping[str, int | str] | None = None,
        **options: Any,
    ) -> None:
        """Load the small model, and the large one if there is room for both."""
        check_keywords(options, LOAD_KEYWORDS)
        given = [mean_logprob()] if escalate is None else escalate if isinstance(escalate, Sequence) else [escalate]
        if not given or not all(map(callable, given)):
            raise TypeError(
                "escalate must be a function of a draft, such as overspill.mean_logprob(below=-1.0), or several, "
                f"not {shown(escalate)}"
            )
        self.escalations: Sequence[Escalation] = tuple(given)
        """The functions that judge the small model's replies, in order."""
        self.keeps_both = True
        """Whether both models are in memory; otherwise one at a time."""
        self.budget = ""
        """Why both are or one is in memory, in words."""
        self._options = options
        sizes = parse_memory(memory)
        add_rpc_servers(options.get("rpc", ()))
        self._memory = by_device("memory", sizes, devices_for_layers(devices())) if sizes else {}
        self._origin = Origin()
        self._lock = threading.Lock()
        self._closed = False
        self._streams: weakref.WeakSet[CascadeStream] = weakref.WeakSet()
        self.models: dict[Which, Model] = {}
        """The models that are loaded."""
        self._files: dict[Which, Path | ModelInfo] = {}
        for which, one in zip(_BOTH, (small, large), strict=True):
            if isinstance(one, Model):
                self.models[which] = one
            else:
                as_path(which, one)
                with naming(which):
                    self._files[which] = one if isinstance(one, ModelInfo) else resolve(one)
        if len(self._files) == 2:
            self._plan_budget()
        else:
            self.budget = "a model that was given loaded stays so"
        try:
            self._load_first()
        except BaseException:
            self.close()
            raise

    def _load_first(self) -> None:
        for which in _BOTH if self.keeps_both else _BOTH[:1]:
            if which in self.models:
                continue
            try:
                self.models[which] = self._load(which)
            except OutOfMemoryError as error:
                # A forecast that was too good is no reason to give up.
                if which == "small" or len(self._files) < 2:
                    raise
                self.keeps_both, self.budget = False, f"one model at a time: {error}"

    def _plan_budget(self) -> None:
        """Decide by forecasts whether both files are loaded; speeds do not matter, so nothing is measured."""
        small, large = (ModelInfo.from_file(self._files[which]) for which in _BOTH)
        self._files = {"small": small, "large": large}
        hardware = Hardware.here(small, memory=self._memory, n_threads=self._options.get("n_threads"), measure=False)
        self.keeps_both, self.budget = fit_together(small, large, hardware, self._options)

    def _load(self, which: Which, user: CascadeStream | None = None) -> Model:
        memory = dict(self._memory)
        if memory and self.models:
            for name, size in memory.items():
                used = sum(model.memory[name].total_bytes for model in self.models.values() if name in model.memory)
                memory[name] = max(0, size - used)
        options = dict(self._options)
        report = options.pop("progress", None)
        if user is not None or report is not None:
            options["progress"] = lambda share: (
                (user is None or not user._is_over) and (report is None or report(share) is not False)
            )
        return Model(self._files[which], memory=memory, **options)

    def _take(self, which: Which, user: CascadeStream) -> tuple[Model, bool]:
        """Return a model, and whether it was loaded for that."""
        self._origin.check("the cascade")
        with self._lock:
            if self._closed:
                raise ClosedError("the cascade is closed")
            self._streams.add(user)
            if which in self.models:
                return self.models[which], False
            for other in set(self.models) & set(self._files):
                if any(not stream._is_over for stream in self._streams if stream is not user):
                    raise Error(
                        f"there is memory for one model at a time, and another stream still needs the {other} one: "
                        "end or close it first"
                    )
                self.models.pop(other).close()
            self.models[which] = self._load(which, user)
            return self.models[which], True

    def chat(self, messages: str | Sequence[Message], *, show_draft: bool = False, **options: Any) -> CascadeStream:
        """Return a stream of a reply to a conversation: the small model's, or the large model's if that one fails.

        Parameters
        ----------
        messages
            As for :meth:`Model.chat`.
        show_draft
            Whether the small model's tokens come out before they have been judged; see :class:`Cascade`.
        **options
            Those of :meth:`Model.chat`, for both models.

        Raises
        ------
        ClosedError, UnusableError, Error, ContextFullError, ValueError, TypeError
            As for :meth:`Model.chat`, and whatever an escalation raises. :class:`Error` also if memory holds one model
            at a time, and a stream of the other one is open.
        """
        check_keywords(options, CHAT_KEYWORDS)
        return self._opened(lambda model, more: model.chat(messages, **more), options, show_draft)

    def stream(self, prompt: str, *, show_draft: bool = False, **options: Any) -> CascadeStream:
        """Return a stream that continues ``prompt``, a text: the models may number their tokens differently.

        The other parameters and the errors are those of :meth:`Model.stream` and of :meth:`chat`.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"prompt must be a string, since token ids are one model's own, not {shown(prompt)}")
        as_text("prompt", prompt)
        check_keywords(options, STREAM_KEYWORDS)
        return self._opened(lambda model, more: model.stream(prompt, **more), options, show_draft)

    def _opened(
        self,
        start: Callable[[Model, Mapping[str, Any]], Stream | ChatStream],
        options: Mapping[str, Any],
        show_draft: bool,
    ) -> CascadeStream:
        check_for_any_model(options)
        return CascadeStream(self._take, self.escalations, start, options, as_flag("show_draft", show_draft))

    def close(self) -> None:
        """End the open streams, and close the models that were loaded here. Idempotent."""
        if not self._origin.is_here:
            return  # they are another process's
        for stream in list(self._streams):
            stream.close()
        with self._lock:
            self._closed = True
            for which in self._files:
                if which in self.models:
                    self.models.pop(which).close()

    def __enter__(self) -> Cascade:
        """Return the cascade itself; it is closed when the block is left."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the cascade."""
        self.close()

    def __repr__(self) -> str:
        """Return which models are loaded."""
        loaded = ", ".join(f"{which}: {self.models[which].path.name}" for which in _BOTH if which in self.models)
        return short_repr(self, "closed" if self._closed else loaded)
