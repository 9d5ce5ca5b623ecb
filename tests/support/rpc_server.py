"""The ``ggml-rpc-server`` that is in the wheel, for tests and for the programs that tests start."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from overspill.machine.rpc_server import PROGRAM
from programs import WITHOUT_GPU


def free_port() -> int:
    """Return a port of loopback at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def listens(port: int) -> bool:
    """Tell whether somebody listens there."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def address_space_bytes(pid: int) -> int:
    """Return how much address space a process on Linux uses."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmSize:"))


def start_server(port: int, *, room_bytes: int | None = None) -> subprocess.Popen[bytes]:
    """Start one with a single thread, and wait until it listens; on Linux its room for more may be limited."""
    command = [str(PROGRAM), "--host", "127.0.0.1", "--port", str(port), "--threads", "1"]
    # On its CPU, whose results are those of ours to the bit.
    environment = {**os.environ, **WITHOUT_GPU}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    deadline = time.monotonic() + 30
    while not listens(port):
        assert time.monotonic() < deadline, "the server does not listen"
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    if room_bytes is not None:
        import resource

        # What a server takes by itself depends on the machine, so it is measured.
        limit = address_space_bytes(process.pid) + room_bytes
        resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))
    return process


@contextmanager
def running_server(*, room_bytes: int | None = None) -> Iterator[str]:
    """Start one for a block; yield its endpoint."""
    port = free_port()
    with start_server(port, room_bytes=room_bytes) as process:
        try:
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()


class FragileWire:
    """A port that passes bytes on to a server and back, and cuts the connection after so many of them."""

    def __init__(self, port: int) -> None:
        """Listen on a port of its own, for the server's ``port``."""
        self.n_bytes = 0
        self.cut_at: float = float("inf")
        self._server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            ends = (self._listener.accept()[0], socket.create_connection(("127.0.0.1", self._server_port)))
            for end in ends:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, target in (ends, ends[::-1]):
                threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                rest = self.cut_at - self.n_bytes
                self.n_bytes += len(data)
                if len(data) >= rest:
                    target.sendall(data[: max(0, int(rest))])
                    break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
