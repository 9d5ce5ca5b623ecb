"""The devices that llama.cpp can compute on."""

from __future__ import annotations

import functools
import logging
import os
import socket
import struct
import sys
from pathlib import Path

from overspill import _core
from overspill.types import Device

__all__ = ["add_rpc_server", "devices", "physical_cores"]

logger = logging.getLogger("overspill")


def devices() -> list[Device]:
    """Return every device, GPUs first, the CPU last, with what is free on it now.

    A build for a GPU that finds none says so once, in the log ``overspill``.
    """
    found = [Device(**device) for device in _core.devices()]
    _warn_without_gpu(tuple(device.backend for device in found))
    return sorted(found, key=lambda device: (device.kind == "cpu", device.kind == "accelerator"))


@functools.cache
def _warn_without_gpu(backends: tuple[str, ...]) -> None:
    for backend in _core.GPU_BACKENDS:
        if backend not in backends:
            logger.warning("built with %s, but no usable GPU was found for it: running on the CPU", backend)


def add_rpc_server(endpoint: str, *, timeout_s: float = 5.0) -> list[Device]:
    """Add the devices of a ``ggml-rpc-server`` on another machine; return them.

    The connection has no authentication and no encryption: use it in a network that you trust.

    Parameters
    ----------
    endpoint
        ``"host:port"``.
    timeout_s
        Seconds to wait for the connection, over 0.

    Raises
    ------
    ValueError
        ``endpoint`` is not of that form.
    Error
        Nobody listens there, or it is no server of this llama.cpp's protocol.
    """
    host, colon, port = endpoint.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f'endpoint must be "host:port", not {endpoint!r}')
    _greet_rpc_server(endpoint, host.strip("[]"), int(port), timeout_s)
    before = {device.name for device in devices()}
    _core.add_rpc_server(endpoint)
    return [device for device in devices() if device.name not in before]


def _greet_rpc_server(endpoint: str, host: str, port: int, timeout_s: float) -> None:
    """Say hello as llama.cpp does; it would end the process over an answer that it does not expect."""
    # ggml-rpc.cpp: command 14, the size of the request, 24 bytes of capabilities; the answer is its
    # size, three numbers of the version, a byte of padding, and 24 bytes of capabilities.
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as connection:
            connection.sendall(struct.pack("<BQ24x", 14, 24))
            answer = b""
            while len(answer) < 36 and (received := connection.recv(36 - len(answer))):
                answer += received
    except OSError as error:
        raise _core.Error(f"no RPC server answers at {endpoint}: {error}") from None
    size, major, minor = struct.unpack_from("<QBB", answer.ljust(36, b"\0"))
    if size != 28:
        raise _core.Error(f"what answers at {endpoint} is no ggml-rpc-server")
    expected = _core.RPC_PROTOCOL_VERSION
    if major != expected[0] or minor > expected[1]:
        raise _core.Error(
            f"the RPC server at {endpoint} speaks version {major}.{minor} of the protocol, and this build "
            f"{expected[0]}.{expected[1]}: run the ggml-rpc-server of the same overspill there"
        )


def physical_cores() -> int:
    """Return the number of physical cores that this process may use, at least 1."""
    if sys.platform != "linux":
        # Half of the logical ones, where simultaneous multithreading is usual.
        logical = os.cpu_count() or 1
        return max(1, logical if sys.platform == "darwin" else logical // 2)
    usable = os.sched_getaffinity(0)
    siblings = set()
    for cpu in usable:
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings").read_text())
        except OSError:
            return len(usable)
    return len(siblings)
