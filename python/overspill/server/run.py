"""The server's process: it listens until a signal, and then ends every stream with a reason."""

from __future__ import annotations

import asyncio
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from overspill._core import Error

__all__ = ["run"]

_SECONDS_TO_END = 1


class _Server(uvicorn.Server):
    """Ends the streams when it is told to end; uvicorn would wait for them."""

    def __init__(self, config: uvicorn.Config, closing: asyncio.Event) -> None:
        super().__init__(config)
        self._closing = closing
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._closing.set)
        super().handle_exit(sig, frame)


def run(app: FastAPI, closing: asyncio.Event, host: str, port: int, *, verbose: bool = False) -> None:
    """Listen until SIGINT or SIGTERM.

    Raises
    ------
    Error
        The address is taken, or none of this machine's.
    KeyboardInterrupt
        The signal was Ctrl-C.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named, since asyncio sends at once only where it knows the protocol; else each piece of an answer waits 40 ms for
    # the client's system to say that it has the one before.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise Error(f"cannot listen at {host}, port {port}: {error.strerror or error}; give another --port") from None
    level = "info" if verbose else "warning"
    config = uvicorn.Config(
        app, log_level=level, access_log=verbose, timeout_graceful_shutdown=_SECONDS_TO_END, server_header=False
    )
    server = _Server(config, closing)
    with listening:
        server.run(sockets=[listening])
