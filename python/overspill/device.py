"""The devices that llama.cpp can compute on."""

from __future__ import annotations

import functools
import logging
import os
import socket
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
    # llama.cpp ends the process if it cannot connect later on, so look first.
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
    except OSError as error:
        raise _core.Error(f"no RPC server answers at {endpoint}: {error}") from None
    before = {device.name for device in devices()}
    _core.add_rpc_server(endpoint)
    return [device for device in devices() if device.name not in before]


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
