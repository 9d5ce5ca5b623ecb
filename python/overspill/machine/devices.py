"""The devices that llama.cpp can compute on."""

from __future__ import annotations

import functools
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence

from overspill._core import GPU_BACKENDS, RPC_PROTOCOL_VERSION, Error
from overspill._core import add_rpc_server as native_add_rpc_server
from overspill._core import devices as native_devices
from overspill.base.checks import as_list, as_real, as_text, device_index, naming, shown
from overspill.base.values import Device

__all__ = [
    "add_rpc_server",
    "add_rpc_servers",
    "by_device",
    "check_names",
    "devices",
    "devices_for_layers",
    "greet_rpc_server",
]

logger = logging.getLogger("overspill")

_LONGEST_S = 86400.0
_adding = threading.RLock()  # a signal handler may ask for it again
_is_adding = False
_added: set[str] = set()


def _forget_adding() -> None:
    # The thread that was adding one is not in a forked process.
    global _adding, _is_adding
    _adding, _is_adding = threading.RLock(), False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_adding)


def devices() -> list[Device]:
    """Return every device with its free memory, GPUs first, the CPU last.

    A device of an RPC server that does not answer has 0 bytes, free and in total. A build for GPUs that finds none
    logs a warning once, to ``overspill``.
    """
    found = [
        Device(
            one.name,
            one.description,
            one.kind,
            one.backend,
            one.free_bytes,
            one.total_bytes,
            one.registers_host_memory,
        )
        for one in native_devices()
    ]
    _warn_without_gpu(tuple(device.backend for device in found))
    return sorted(found, key=lambda device: (device.kind == "cpu", device.kind == "accelerator"))


@functools.cache
def _warn_without_gpu(backends: tuple[str, ...]) -> None:
    for backend in GPU_BACKENDS:
        if backend not in backends:
            logger.warning("built with %s, but no usable GPU was found for it: running on the CPU", backend)


def devices_for_layers(found: Sequence[Device]) -> list[Device]:
    """Return the devices among ``found`` that llama.cpp puts layers on, in its order: RPC servers, GPUs, the CPU.

    Raises
    ------
    Error
        There is no CPU among them.
    """
    # As llama_prepare_model_devices in src/llama.cpp: integrated GPUs serve only where there is no other.
    servers = []
    for device in (device for device in found if device.backend == "RPC"):
        if device.total_bytes:
            servers.append(device)
        else:
            logger.warning("%s is left out: no RPC server answers at %s", device.name, device.description)
    gpus = [device for device in found if device.kind == "gpu" and device.backend != "RPC"]
    integrated = [device for device in found if device.kind == "integrated_gpu"]
    cpus = [device for device in found if device.kind == "cpu"]
    if not cpus:
        raise Error("no CPU backend of llama.cpp was found: the installation is damaged, install overspill anew")
    return [*servers, *(gpus or integrated), cpus[0]]


def by_device(argument: str, sizes: Mapping[str, int], found: Sequence[Device]) -> dict[str, int]:
    """Return the sizes by the full names of devices, of which the CPU is the last.

    ``"gpu"`` without a GPU is left out, so that a script may limit one wherever it runs.

    Raises
    ------
    ValueError
        There is no device of a name.
    """
    names = [device.name for device in found]
    named = {}
    for name, n_bytes in sizes.items():
        index = device_index(names, as_text(argument, name))
        if index is not None:
            named[names[index]] = n_bytes
        elif name.casefold() != "gpu":
            raise ValueError(f"{argument}: there is no device {shown(name)} here, only {', '.join(names)}")
    return named


def check_names(argument: str, sizes: Mapping[str, int], *, of_gpus: bool = False) -> None:
    """Raise a ValueError if there is no device of a name; ``"cpu"`` and ``"gpu"`` are known without asking any."""
    names = {name.casefold() for name in sizes}
    if of_gpus and "cpu" in names:
        raise ValueError(f"{argument} must be on GPUs, and not on the CPU")
    if not names <= {"cpu", "gpu"}:
        by_device(argument, sizes, [device for device in devices() if device.kind != "accelerator"])


def add_rpc_servers(endpoints: object) -> None:
    """Add the servers that the argument ``rpc`` names."""
    for endpoint in as_list("rpc", endpoints, '"host:port"'):
        with naming("rpc"):
            add_rpc_server(endpoint)


def add_rpc_server(endpoint: str, *, timeout_s: float = 5.0) -> list[Device]:
    """Return the devices of a ``ggml-rpc-server`` on another machine, after adding them to this process.

    The devices stay for the life of the process; adding them again changes nothing. The connection has no
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
        Nothing answers there, the server works for another process, or it speaks another protocol than this llama.cpp.
    """
    host, _, port = as_text("endpoint", endpoint).rpartition(":")
    # llama.cpp splits at the first colon, so addresses of IPv6 are not for it.
    is_host = host and ":" not in host and "\0" not in host and len(host) < 256
    if not (is_host and port.isdecimal() and len(port) < 6 and 0 < int(port) < 65536):
        raise ValueError(f'endpoint must be "host:port", not {shown(endpoint)}')
    timeout_s = as_real("timeout_s", timeout_s)
    if not 0 < timeout_s <= _LONGEST_S:
        raise ValueError(f"timeout_s must be over 0, and at most {_LONGEST_S:.0f} seconds, not {timeout_s}")
    global _is_adding
    with _adding:
        if _is_adding:
            raise Error("an RPC server is being added on this very thread: a signal handler cannot add one meanwhile")
        _is_adding = True
        try:
            # A server talks to one connection at a time, and an open model has one already.
            if endpoint not in _added:
                greet_rpc_server(endpoint, host, int(port), timeout_s)
                native_add_rpc_server(endpoint)
                _added.add(endpoint)
        finally:
            _is_adding = False
    found = [device for device in devices() if device.backend == "RPC" and device.description == endpoint]
    if not all(device.total_bytes for device in found):
        raise Error(
            f"no RPC server answers at {endpoint}: it is gone, works for another process, or was lost while models "
            "that are still open used it"
        )
    return found


def greet_rpc_server(endpoint: str, host: str, port: int, timeout_s: float) -> None:
    """Check that a server of this llama.cpp's protocol answers; llama.cpp itself would end the process if not.

    Raises
    ------
    Error
        Nothing answers within ``timeout_s`` seconds, or it is no such server.
    """
    # ggml-rpc.cpp: command 14, the size of the request, 24 bytes of capabilities; the answer is its
    # size, three numbers of the version, a byte of padding, and 24 bytes of capabilities.
    give_up_at = time.monotonic() + timeout_s
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as connection:
            connection.sendall(struct.pack("<BQ24x", 14, 24))
            answer = b""
            while len(answer) < 36:
                connection.settimeout(max(0.001, give_up_at - time.monotonic()))
                if not (received := connection.recv(36 - len(answer))):
                    break
                answer += received
    except TimeoutError:
        raise Error(
            f"no RPC server answers at {endpoint} within {timeout_s:g} s; does it work for another process?"
        ) from None
    except (OSError, UnicodeError) as error:  # of a name that no host can have
        raise Error(f"no RPC server answers at {endpoint}: {error}") from None
    size, major, minor = struct.unpack_from("<QBB", answer.ljust(36, b"\0"))
    if size != 28:
        raise Error(f"what answers at {endpoint} is no ggml-rpc-server")
    expected = RPC_PROTOCOL_VERSION
    if major != expected[0] or minor > expected[1]:
        raise Error(
            f"the RPC server at {endpoint} speaks version {major}.{minor} of the protocol, and this build "
            f"{expected[0]}.{expected[1]}: run the ggml-rpc-server of the same overspill there"
        )
