"""Layers on a device that is not this process's CPU: the shipped ``ggml-rpc-server`` on loopback."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import overspill
from overspill import _core

# In a process of its own, since a device cannot be taken away again.
TRIAL = """
import sys
import overspill

path, endpoint = sys.argv[1:]
options = {"n_ctx": 256, "n_threads": 1}

def greedy(**offload):
    with overspill.Model(path, **options, **offload) as model:
        return [token.id for token in model.generate("Once upon a time", temperature=0, max_tokens=24).tokens]

alone = greedy()
(device,) = overspill.add_rpc_server(endpoint)
assert device.kind == "gpu" and device.backend == "RPC" and endpoint in device.description + device.name, device
assert 0 < device.free_bytes <= device.total_bytes
assert device in overspill.devices() or device.name == overspill.devices()[0].name
for offload in ("cpu", 0, 1, 3, "gpu", "auto"):
    assert greedy(offload=offload) == alone, offload
print("same")
"""


@pytest.fixture
def rpc_server() -> Iterator[str]:
    """Start the server that is in the wheel; return its endpoint."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    name = "ggml-rpc-server.exe" if sys.platform == "win32" else "ggml-rpc-server"
    command = [str(Path(_core.__file__).parent / "lib" / name), "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen([*command, "--threads", "1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield f"127.0.0.1:{port}"
    process.terminate()
    output, _ = process.communicate(timeout=30)
    assert b"CPU" in output, output


def test_layers_on_a_remote_device_give_the_same_text(rpc_server: str, tiny_gpt_oss_path: Path) -> None:
    """Wherever the layers lie, greedy tokens are the same."""
    command = [sys.executable, "-c", TRIAL, str(tiny_gpt_oss_path), rpc_server]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr[-2000:]


@pytest.mark.parametrize("endpoint", ["", "host", "host:", ":1234", "host:port", "host:0", "host:70000"])
def test_bad_endpoints(endpoint: str) -> None:
    """What is no endpoint is the caller's mistake."""
    with pytest.raises(ValueError, match="host:port"):
        overspill.add_rpc_server(endpoint)


def test_nobody_listens() -> None:
    """An error, where llama.cpp itself would end the process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(overspill.Error, match=f"no RPC server answers at {endpoint}"):
        overspill.add_rpc_server(endpoint, timeout_s=1)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"", "is no ggml-rpc-server"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" * 9, "is no ggml-rpc-server"),
        (struct.pack("<QBBBx24x", 28, 200, 1, 0), "speaks version 200.1"),
        (None, "no RPC server answers"),
    ],
)
def test_somebody_else_listens(answer: bytes | None, text: str) -> None:
    """Who hangs up, speaks something else, or says nothing at all is refused before llama.cpp talks to it."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def serve() -> None:
            client, _ = server.accept()
            with client:
                client.recv(33)
                if answer is None:
                    client.recv(1)  # until the other side gives up
                else:
                    client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(overspill.Error, match=text):
            overspill.add_rpc_server(f"127.0.0.1:{server.getsockname()[1]}", timeout_s=0.5)
        thread.join()
