"""The devices that llama.cpp can compute on."""

from __future__ import annotations

import functools
import logging
import socket
import struct
import threading

from overspill import _core
from overspill.base.values import Device

__all__ = ["add_rpc_server", "devices", "greet_rpc_server"]

logger = logging.getLogger("overspill")

_adding = threading.Lock()
_added: set[str] = set()


def devices() -> list[Device]:
    """Return every device, GPUs first, the CPU last, with what is free on it now.

    A device of an RPC server that does not answer has 0 bytes, free and in total.
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

    They stay for the life of the process, and adding them again changes nothing. The connection has no
    authentication and no encryption: use it in a network that you trust.

    Parameters
    ----------
    endpoint
        ``"host:port"``; the host is a name or an IPv4 address.
    timeout_s
        Seconds to wait for the connection, over 0.

    Raises
    ------
    ValueError
        ``endpoint`` is not of that form.
    Error
        Nobody listens there, it works for another process, or it is no server of this llama.cpp's protocol.
    """
    host, _, port = endpoint.rpartition(":")
    # llama.cpp splits at the first colon, so addresses of IPv6 are not for it.
    if not (host and ":" not in host and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f'endpoint must be "host:port", not {endpoint!r}')
    with _adding:
        # A server talks to one connection at a time, and an open model has one already.
        if endpoint not in _added:
            greet_rpc_server(endpoint, host, int(port), timeout_s)
            _core.add_rpc_server(endpoint)
            _added.add(endpoint)
    found = [device for device in devices() if device.backend == "RPC" and device.description == endpoint]
    if not all(device.total_bytes for device in found):
        raise _core.Error(
            f"no RPC server answers at {endpoint}: it is gone, works for another process, or was lost while models "
            "that are still open used it"
        )
    return found


def greet_rpc_server(endpoint: str, host: str, port: int, timeout_s: float) -> None:
    """Say hello as llama.cpp does; it would end the process over an answer that it does not expect."""
    # ggml-rpc.cpp: command 14, the size of the request, 24 bytes of capabilities; the answer is its
    # size, three numbers of the version, a byte of padding, and 24 bytes of capabilities.
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as connection:
            connection.sendall(struct.pack("<BQ24x", 14, 24))
            answer = b""
            while len(answer) < 36 and (received := connection.recv(36 - len(answer))):
                answer += received
    except TimeoutError:
        raise _core.Error(
            f"no RPC server answers at {endpoint} within {timeout_s:g} s; does it work for another process?"
        ) from None
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
