"""Offer this machine's devices to another machine, with the ``ggml-rpc-server`` of the package."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from overspill._core import Error
from overspill._core import __file__ as core_file
from overspill.base.host import physical_cores
from overspill.machine.devices import greet_rpc_server

__all__ = ["PROGRAM", "serve"]

PROGRAM = Path(core_file).parent / "lib" / f"ggml-rpc-server{'.exe' if sys.platform == 'win32' else ''}"


def serve(host: str, port: int, n_threads: int | None, devices: Sequence[str], report: Callable[[str], None]) -> None:
    """Run the server until a signal ends it.

    Parameters
    ----------
    host
        The name or IPv4 address to listen at; ``"0.0.0.0"`` for all of this machine.
    port
        The port, 1 to 65535.
    n_threads
        Threads of the CPU; None for the number of physical cores.
    devices
        Names of the devices to offer; empty for all.
    report
        Called with each line of the server's log.

    Raises
    ------
    Error
        The server cannot listen there, does not know a device, or ended by itself.
    KeyboardInterrupt
        Ctrl-C ended it.
    """
    address = _try_to_listen(host, port)
    command = [str(PROGRAM), "--host", address, "--port", str(port), "--threads", str(n_threads or physical_cores())]
    if devices:
        command += ["--device", ",".join(devices)]
    if not address.startswith("127."):
        report(
            f"warning: {address} is not this machine alone: whoever reaches port {port} can use the server and read "
            "what it computes, since the protocol has no authentication and no encryption"
        )
    with _server(command) as server:
        _wait_until_it_answers(server, "127.0.0.1" if address == "0.0.0.0" else address, port)
        report(f"listening at {address}:{port}; Ctrl-C ends it")
        ours = ["Accepted client connection", "Client connection closed"]  # of the check that it answers
        for line in _lines(server):
            if line in ours:
                ours.remove(line)
            else:
                report(line)
        if server.wait() == -signal.SIGINT:
            raise KeyboardInterrupt
        raise Error(f"the server ended by itself, with exit code {server.returncode}")


def _try_to_listen(host: str, port: int) -> str:
    """Return the IPv4 address of ``host``. The server takes no names, and does not say why it cannot listen."""
    try:
        address = socket.gethostbyname(host)
        with socket.socket() as probe:
            if sys.platform != "win32":  # there, the option lets two programs listen
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError as error:
        raise Error(f"cannot listen at {host}:{port}: {error.strerror or error}") from None
    return address


@contextmanager
def _server(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Run the server; end it when the block is left, on SIGTERM too."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace"
    )
    try:
        yield server
    finally:
        server.terminate()
        server.wait()
        signal.signal(signal.SIGTERM, before)


def _wait_until_it_answers(server: subprocess.Popen[str], host: str, port: int, timeout_s: float = 60.0) -> None:
    give_up_at = time.monotonic() + timeout_s
    while True:
        try:
            return greet_rpc_server(f"{host}:{port}", host, port, timeout_s)
        except Error:
            if server.poll() is not None:
                said = [line.removeprefix("error: ") for line in _lines(server) if line != "No devices found"]
                raise Error(f"the server did not start: {', '.join(said)}".replace(":,", ":")) from None
            if time.monotonic() > give_up_at:
                raise
        time.sleep(0.05)


def _lines(server: subprocess.Popen[str]) -> Iterator[str]:
    """Yield the lines that the server prints, without its warnings and the facts that ``serve`` reports."""
    assert server.stdout is not None
    noise = (
        *("!!!", "WARNING: Host", "Never expose the RPC server", "This is an experimental feature"),
        *("Starting RPC server", "endpoint", "local cache", "transport"),
    )
    for line in server.stdout:
        if line.strip() and not line.strip().startswith(noise):
            yield line.strip()
