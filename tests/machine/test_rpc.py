"""Layers on a device that is not this process's CPU: the shipped ``ggml-rpc-server`` on loopback."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import overspill
from programs import python_environment
from rpc_server import free_port, listens
from sweeps import sweep

# The server's device is the only one beside the CPU.
pytestmark = pytest.mark.usefixtures("no_gpu")

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
assert [again.name for again in overspill.add_rpc_server(endpoint)] == [device.name]
assert device.kind == "gpu" and device.backend == "RPC" and endpoint in device.description + device.name, device
assert 0 < device.free_bytes <= device.total_bytes
assert device in overspill.devices() or device.name == overspill.devices()[0].name
for offload in ("cpu", 0, 1, 3, "gpu", "auto"):
    assert greedy(offload=offload) == alone, offload
print("same")
"""


# A server that is killed by SIGKILL says nothing; its system closes the connection.
LOST = """
import signal
import sys
import pytest
import overspill
from overspill import _core
from rpc_server import free_port, start_server

signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as programs for pipes have it; a lost connection must not raise it
path = sys.argv[1]
port = free_port()
endpoint = f"127.0.0.1:{port}"
lost = f"the RPC server at {endpoint} was lost while "
server = start_server(port)

def load(**options):
    # With the products that the server has, since others may choose other tokens.
    return overspill.Model(path, rpc=[endpoint], n_ctx=256, n_threads=1, kernels="llama.cpp", **options)

def kill():
    server.kill()
    server.wait()

with overspill.Model(path, offload="cpu", n_ctx=256, n_threads=1, kernels="llama.cpp") as model:
    alone = [token.id for token in model.generate("Once upon a time", temperature=0, max_tokens=24).tokens]

for offload in (1, 3, "gpu"):
    model = load(offload=offload)
    logits = model.eval(model.tokenize("Once upon"))
    other = model.stream("Once", temperature=0)
    next(other)
    stream = model.stream("Once upon a time", temperature=0, max_tokens=24)
    tokens = []
    with pytest.raises(overspill.Error, match=lost + "decoding"):
        for token in stream:
            tokens.append(token.id)
            if len(tokens) == 4:
                kill()
    # The next token may have been there already.
    assert len(tokens) in (4, 5) and tokens == alone[: len(tokens)]
    assert stream.stats.stop_reason == "error"
    with pytest.raises(overspill.Error, match=lost):
        list(other)
    for _ in range(2):
        with pytest.raises(overspill.Error, match=lost):
            model.eval(model.tokenize("Once upon"))
    with pytest.raises(overspill.Error, match=lost):
        model.generate("Once upon a time")
    assert model.tokenize("Once")  # what needs no server goes on
    assert [device.total_bytes > 0 for device in overspill.devices()] == [False, True]
    with pytest.raises(overspill.Error, match=f"no RPC server answers at {endpoint}"):
        load(offload=offload)
    model.close()
    del logits
    with pytest.raises(overspill.Error, match=f"no RPC server answers at {endpoint}"):
        load(offload=offload)
    # Nobody listens there at all, and a model that does not use it is none the worse.
    assert overspill.devices()[0].total_bytes == 0
    with overspill.Model(path, offload="cpu", n_ctx=256, n_threads=1, kernels="llama.cpp") as model:
        assert [token.id for token in model.generate("Once upon a time", temperature=0, max_tokens=24).tokens] == alone

    server = start_server(port)
    reports = []
    with pytest.raises(overspill.Error, match=lost + "loading"):
        load(offload=offload, progress=lambda share: kill() if 0 < share < 1 and not reports.append(share) else None)
    assert reports
    server = start_server(port)
    with load(offload=offload) as model:
        assert [token.id for token in model.generate("Once upon a time", temperature=0, max_tokens=24).tokens] == alone
    assert len(overspill.devices()) == 2  # the same device all along

# A measurement with a lost server is no measurement, and a plan does without it.
meter = _core.DeviceMeter("RPC0", n_threads=1, working_set_bytes=2**24, gpus=[], budget_s=0.01)
assert meter.link_rates(1000, False).to_device_bytes_per_s > 0
kill()
for measure in (
    lambda: meter.link_rates(1000, False),
    lambda: meter.visit_s(256),
    lambda: meter.operation_s(256),
    lambda: meter.weight_rate("f16", 256, 256, 0, 0),
):
    with pytest.raises(overspill.Error, match=lost + "RPC0 was measured"):
        measure()
del meter, measure
with pytest.raises(overspill.Error, match=f"no RPC server answers at {endpoint}"):
    _core.DeviceMeter("RPC0", n_threads=1, working_set_bytes=2**24, gpus=[], budget_s=0.01)
assert [device.name for device in overspill.Hardware.here(measure=False).devices] == ["CPU"]
with overspill.Model(path, n_ctx=256, n_threads=1) as model:
    assert [token.id for token in model.generate("Once upon a time", temperature=0, max_tokens=24).tokens] == alone
print("survived")
"""

# Wherever in the conversation the connection breaks, the answer is an error or the right text.
CUT = """
import re
import sys
import overspill
from rpc_server import FragileWire, free_port, start_server

path, n_servers = sys.argv[1], int(sys.argv[2])
ports = [free_port() for _ in range(n_servers)]
servers = [start_server(port) for port in ports]
wires = [FragileWire(port) for port in ports]
wire = wires[0]

def reply(cut_after=None):
    endpoints = [wire.endpoint for wire in wires]
    with overspill.Model(path, rpc=endpoints, offload=4, n_ctx=256, n_threads=1) as model:
        loaded = wire.n_bytes
        if cut_after is not None:
            wire.cut_at = loaded + cut_after
        tokens = [token.id for token in model.generate("Once upon a time", temperature=0, max_tokens=4).tokens]
        return tokens, loaded, wire.n_bytes - loaded

reply()
wire.n_bytes = 0
right, n_load, n_decode = reply()
n_cuts = 16
lost = set()
for number in range(2 * n_cuts):
    share = (number % n_cuts + 0.5) / n_cuts
    wire.n_bytes = 0
    try:
        if number < n_cuts:
            wire.cut_at = share * n_load
            reply()
        else:
            assert reply(cut_after=share * n_decode)[0] == right, share
    except overspill.Error as error:
        assert wire.endpoint in str(error), error
        lost.update(re.findall("was lost while ([a-z]+)", str(error)))
    else:
        assert number >= n_cuts, share
    wire.cut_at = float("inf")
    if number % 4 == 3:
        assert reply()[0] == right
assert {"loading", "decoding"} <= lost, lost
for server in servers:
    server.kill()
    server.wait()
print("survived")
"""


# A server that hangs: the system acknowledges what is sent to it, and nothing comes back.
HANGING = """
import os, signal, sys, threading, time
import overspill
from overspill import Model
from rpc_server import free_port, start_server

path, chosen = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)
port = free_port()
endpoint = f"127.0.0.1:{port}"
server = start_server(port)
options = {"rpc": [endpoint], "offload": 3, "n_ctx": 256, "n_threads": 1}

def interrupted(call):
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        timer.join()
    return False

def hang(share=1):
    if share:
        server.send_signal(signal.SIGSTOP)

if chosen == "load":
    assert interrupted(lambda: Model(path, **options, progress=hang))
elif chosen == "devices":
    assert overspill.add_rpc_server(endpoint)
    hang()
    assert interrupted(overspill.devices)
else:
    model = Model(path, **options)
    stream = model.stream("Once upon a time")
    next(stream)
    logits = model.eval([5])
    hang()
    calls = {
        "decode": lambda: list(stream),
        "look-ahead": lambda: (next(stream), time.sleep(0.1), list(stream)),
        "context": lambda: next(model.stream("Another one, with a place of its own")),
        "eval": lambda: model.eval([6]),
        "eval of more rows": lambda: model.eval([6, 7], logits="all"),
        "batch": lambda: list(model.generate_many(["a", "b"], max_tokens=4)),
        "memory of an open model": overspill.devices,
    }
    if chosen in calls:
        del logits
        assert interrupted(calls[chosen])
    else:  # nothing has to be waited for, unless the connection is full
        try:
            interrupted(model.close)
        except KeyboardInterrupt:
            pass
        assert model.closed
    model.close()
    del stream
# The interpreter goes on, and a server that runs is as good as ever.
server.kill()
server.wait()
logits = None
server = start_server(port)
with Model(path, **options) as model:
    assert model.generate("Once", max_tokens=2).tokens
server.kill()
server.wait()
print("survived")
"""

# Nobody whom llama.cpp could talk to.
SILENT = """
import os, signal, socket, struct, sys, threading
import overspill

chosen = sys.argv[2]
signal.signal(signal.SIGINT, signal.default_int_handler)
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
port = listener.getsockname()[1]
endpoint = f"127.0.0.1:{port}"
hello = struct.pack("<QBBBx24x", 28, *overspill._core.RPC_PROTOCOL_VERSION, 0)
kept = []

def serve(n_answers):
    for number in range(3):
        client, _ = listener.accept()
        kept.append(client)
        client.recv(33)
        if number < n_answers:
            client.sendall(hello)

if chosen == "black hole":
    listener.listen(0)  # which has room for one or two that nobody accepts
    for _ in range(4):
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex(("127.0.0.1", port))
        kept.append(filler)
else:
    listener.listen()
    n_answers = {"silence": 0, "silence after the greeting": 1, "silence after two greetings": 2}[chosen]
    threading.Thread(target=serve, args=(n_answers,), daemon=True).start()
for add in (overspill.add_rpc_server, lambda endpoint, timeout_s: overspill._core.add_rpc_server(endpoint)):
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        add(endpoint, timeout_s=1000)
    except KeyboardInterrupt:
        timer.join()
    else:
        raise AssertionError("not interrupted")
print("survived")
"""

# What was opened for a connection that came to nothing is closed again.
DESCRIPTORS = """
import os, socket, sys, threading
import overspill
from overspill import Model
from rpc_server import free_port, start_server

path, chosen = sys.argv[1:]
port = free_port()
endpoint = f"127.0.0.1:{port}"

def n_open():
    return len(os.listdir("/proc/self/fd"))

def failing(call):
    try:
        call()
    except overspill.Error:
        return
    raise AssertionError("no error")

if chosen == "refused":
    calls = [lambda: overspill.add_rpc_server(endpoint), lambda: overspill._core.add_rpc_server(endpoint),
             lambda: overspill._core.add_rpc_server("host.invalid:1")]
elif chosen == "rubbish":
    listener = socket.create_server(("127.0.0.1", port))
    def serve():
        while True:
            client, _ = listener.accept()
            with client:
                client.recv(33)
                client.sendall(b"HTTP/1.1 400 Bad Request" + bytes(100))
    threading.Thread(target=serve, daemon=True).start()
    calls = [lambda: overspill.add_rpc_server(endpoint), lambda: overspill._core.add_rpc_server(endpoint)]
else:
    server = start_server(port)
    assert overspill.add_rpc_server(endpoint)
    server.kill()
    server.wait()
    calls = [lambda: overspill.add_rpc_server(endpoint), lambda: Model(path, offload=1, n_ctx=64, n_threads=1)]
    assert overspill.devices()[0].total_bytes == 0
for call in calls:
    failing(call)
    before = n_open()
    for _ in range(10):
        failing(call)
    assert n_open() <= before, (before, n_open(), os.listdir("/proc/self/fd"))
print("survived")
"""


def run_trial(trial: str, *arguments: str) -> None:
    """Run it in a process of its own, which says in one word that it came to its end."""
    environment = python_environment()
    command = [sys.executable, "-c", trial, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert (done.returncode, done.stdout) in ((0, "same\n"), (0, "survived\n")), done.stderr[-2000:]


@pytest.mark.slow
def test_layers_on_a_remote_device_give_the_same_text(rpc_server: str, tiny_gpt_oss_path: Path) -> None:
    """Wherever the layers are, greedy tokens are the same."""
    run_trial(TRIAL, str(tiny_gpt_oss_path), rpc_server)


def test_a_killed_server_ends_streams_and_not_the_process(tiny_gpt_oss_path: Path) -> None:
    """An error in a stream, in ``eval`` and while loading; with a new server all is well again."""
    run_trial(LOST, str(tiny_gpt_oss_path))


@pytest.mark.slow
@pytest.mark.parametrize("n_servers", sweep([1, 2], always=[0]))
def test_the_connection_breaks_anywhere(tiny_gpt_oss_path: Path, n_servers: int) -> None:
    """Half a request or half an answer is an error as well, and never another text."""
    run_trial(CUT, str(tiny_gpt_oss_path), str(n_servers))


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill() does not interrupt on Windows")
@pytest.mark.parametrize(
    "call",
    sweep(
        [
            *("decode", "look-ahead", "context", "eval", "eval of more rows", "batch", "memory of an open model"),
            *("load", "devices", "close"),
        ],
        always=[0],
    ),
)
def test_ctrl_c_while_a_server_hangs(tiny_gpt_oss_path: Path, call: str) -> None:
    """Whatever waits for it is given up, and the process can use another one."""
    run_trial(HANGING, str(tiny_gpt_oss_path), call)


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill() does not interrupt on Windows")
@pytest.mark.parametrize(
    "server",
    sweep(["black hole", "silence", "silence after the greeting", "silence after two greetings"], always=[2]),
)
def test_ctrl_c_while_a_server_is_added(server: str) -> None:
    """Wherever in the greeting the other side falls silent."""
    run_trial(SILENT, "", server)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/fd")
@pytest.mark.parametrize("server", sweep(["refused", "rubbish", "lost"], always=[0]))
def test_failed_connections_are_closed(tiny_gpt_oss_path: Path, server: str) -> None:
    """However a connection comes to nothing, no descriptor is left."""
    run_trial(DESCRIPTORS, str(tiny_gpt_oss_path), server)


def test_a_machine_that_vanishes_is_noticed(rpc_server: str, tiny_gpt_oss_path: Path) -> None:
    """The system asks an idle connection for a sign of life."""
    if shutil.which("ss") is None:
        pytest.skip("ss shows the timers of connections")
    trial = f"""
import subprocess, sys, overspill
with overspill.Model(sys.argv[1], rpc=["{rpc_server}"], offload=1, n_ctx=64, n_threads=1):
    shown = subprocess.run(["ss", "-tno", "dst", "{rpc_server}"], capture_output=True, text=True).stdout
assert "keepalive" in shown, shown
print("survived")
"""
    run_trial(trial, str(tiny_gpt_oss_path))


def serve_device(*options: str) -> tuple[subprocess.Popen[str], list[str]]:
    """Start the command; return it and what it says until it listens or ends."""
    command = [sys.executable, "-m", "overspill", "serve-device", "--threads", "1", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line.rstrip("\n"))
        if line.startswith("listening"):
            break
    return process, said


@pytest.mark.parametrize(("ending", "code"), sweep([(signal.SIGINT, 130), (signal.SIGTERM, 143)], always=[0]))
@pytest.mark.usefixtures("heeds_interrupts")
def test_serve_device(tiny_gpt_oss_path: Path, ending: signal.Signals, code: int) -> None:
    """Another process computes on it; a signal ends it, and leaves no server behind."""
    port = free_port()
    process, said = serve_device("--port", str(port))
    try:
        assert said == [f"listening at 127.0.0.1:{port}; Ctrl-C ends it"]
        command = [sys.executable, "-m", "overspill", "run", str(tiny_gpt_oss_path), "Hello", "-n", "8", "--temp", "0"]
        alone = subprocess.run([*command, "--offload", "cpu"], capture_output=True, text=True, timeout=60)
        remote = [*command, "--offload", "gpu", "--rpc", f"127.0.0.1:{port}"]
        for _ in range(2):
            done = subprocess.run(remote, capture_output=True, text=True, timeout=60)
            assert (done.returncode, done.stdout) == (0, alone.stdout), done.stderr
    finally:
        process.send_signal(ending)
        _, rest = process.communicate(timeout=30)
    assert process.returncode == code
    assert "error" not in rest
    assert "Accepted client connection" in rest
    assert not listens(port)


@pytest.mark.usefixtures("heeds_interrupts")
def test_serve_device_warns_off_loopback() -> None:
    """In one line, before it listens."""
    process, said = serve_device("--host", "0.0.0.0", "--port", str(free_port()))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    warning, listening = said
    assert "no authentication and no encryption" in warning
    assert listening.startswith("listening at 0.0.0.0:")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--port", "{taken}"], "error: cannot listen at 127.0.0.1:{taken}: Address already in use"),
        (["--host", "host.invalid"], "error: cannot listen at host.invalid:50052: "),
        (
            ["--port", "{free}", "--device", "GPU7"],
            # A backend may say before it which devices it has found.
            r"error: the server did not start: (.*, )?unknown device: GPU7, available",
        ),
    ],
)
def test_serve_device_cannot(options: list[str], text: str) -> None:
    """One line says why."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = {"taken": taken.getsockname()[1], "free": free_port()}
        process, said = serve_device(*(option.format(**ports) for option in options))
        process.communicate(timeout=30)
        (line,) = said
        assert re.match(text.format(**ports), line), line
        assert process.returncode == 1


def test_rpc_of_a_model(tiny_gpt_oss_path: Path) -> None:
    """Endpoints are checked before anything is loaded."""
    with pytest.raises(TypeError, match="rpc must be a sequence"):
        overspill.Model(tiny_gpt_oss_path, rpc="127.0.0.1:50052")
    with pytest.raises(ValueError, match="host:port"):
        overspill.Model("missing.gguf", rpc=["somewhere"])
    with pytest.raises(overspill.Error, match="no RPC server answers"):
        overspill.Model("missing.gguf", rpc=[f"127.0.0.1:{free_port()}"])


@pytest.mark.parametrize("endpoint", ["", "host", "host:", ":1234", "host:port", "host:0", "host:70000", "[::1]:1234"])
def test_bad_endpoints(endpoint: str) -> None:
    """What is no endpoint is the caller's mistake."""
    with pytest.raises(ValueError, match="host:port"):
        overspill.add_rpc_server(endpoint)


def test_nobody_listens() -> None:
    """An error, where llama.cpp itself would end the process."""
    endpoint = f"127.0.0.1:{free_port()}"
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
