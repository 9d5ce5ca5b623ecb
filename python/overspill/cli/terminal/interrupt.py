"""Ctrl-C that waits until it loses nothing."""

from __future__ import annotations

import signal
from types import FrameType

from overspill.engine.stream import Stream

__all__ = ["HeldInterrupt"]


class HeldInterrupt:
    """Ctrl-C where it loses nothing: at once while the model computes, otherwise when what it has said is shown.

    Between any two of our instructions, as usual, it could leave words out of the screen or draw a line twice.
    """

    def __init__(self) -> None:
        self._is_pressed = False

    def __enter__(self) -> HeldInterrupt:
        # Whoever had it ignored, or has another way, keeps that.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        if signal.getsignal(signal.SIGINT) == self._take:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _take(self, _number: int, frame: FrameType | None) -> None:
        self._is_pressed = True
        # The step of the model asks for signals from there: a token that it does not return is neither said nor shown.
        if frame is not None and frame.f_code is Stream.__next__.__code__:
            self.deliver()

    def deliver(self) -> None:
        """Raise ``KeyboardInterrupt`` if Ctrl-C has been pressed, once."""
        if self._is_pressed:
            self._is_pressed = False
            raise KeyboardInterrupt
