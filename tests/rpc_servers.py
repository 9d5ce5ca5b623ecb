"""Real ``ggml-rpc-server`` processes on loopback: devices of type GPU, with real transfers, where there is no GPU."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from overspill import _core


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def rpc_server(port: int | None = None, *, max_memory_bytes: int | None = None) -> Iterator[str]:
    """Run the server that is in the wheel, with one thread; yield its endpoint.

    ``max_memory_bytes`` limits its address space, so that it refuses larger buffers.
    """
    port = free_port() if port is None else port
    name = "ggml-rpc-server.exe" if sys.platform == "win32" else "ggml-rpc-server"
    command = [str(Path(_core.__file__).parent / "lib" / name), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--threads", "1"]
    if max_memory_bytes is not None:
        command = ["prlimit", f"--as={max_memory_bytes}", *command]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and process.poll() is None:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
