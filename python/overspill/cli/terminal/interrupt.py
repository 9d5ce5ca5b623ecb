"""Ctrl-C in a chat, held back while it would damage the screen."""

from __future__ import annotations

import signal
from types import FrameType

from overspill.engine.stream import Stream

__all__ = ["HeldInterrupt"]


class HeldInterrupt:
    """Handles Ctrl-C at once while the model computes, and otherwise when all its words are on the screen.

    Python's own handler raises between any two instructions, where words could be lost or a line be drawn twice.
    """

    def __init__(self) -> None:
        self._is_pressed = False

    def __enter__(self) -> HeldInterrupt:
        # An ignored signal stays ignored, and another handler stays in place.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        if signal.getsignal(signal.SIGINT) == self._take:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _take(self, _number: int, frame: FrameType | None) -> None:
        self._is_pressed = True
        # The model's step checks for signals there: without a token returned, nothing has to be shown.
        if frame is not None and frame.f_code is Stream.__next__.__code__:
            self.deliver()

    def deliver(self) -> None:
        """Raise ``KeyboardInterrupt`` if Ctrl-C has been pressed since the last call."""
        if self._is_pressed:
            self._is_pressed = False
            raise KeyboardInterrupt
