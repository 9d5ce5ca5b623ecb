"""Processes that are forked while a model is loaded: no call waits for threads that are not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from programs import WITHOUT_GPU, python_environment

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")

# Threads decode and load while the process is forked, so that their locks are held in some of the children.
TRIAL = """
import gc, os, sys, threading, time
import numpy as np
import overspill
from overspill import Model, Sampler, SamplingOptions

path, ending, n_forks = sys.argv[1], sys.argv[2], int(sys.argv[3])
options = {"n_ctx": 256, "n_threads": 1}
model = Model(path, **options)
tokens = model.tokenize("Once upon a time")
expected = model.generate("Once", temperature=0, max_tokens=3).text
sampler = Sampler(SamplingOptions(temperature=0))
row = np.zeros(model.n_vocab, np.float32)
row[7] = 1

over = threading.Event()
def decode():
    while not over.is_set():
        model.generate("Once", max_tokens=8)
def load():
    while not over.is_set():
        Model(path, vocab_only=True).close()
threads = [threading.Thread(target=work) for work in (decode, decode, load)]
for thread in threads:
    thread.start()

def refused(call):
    try:
        call()
    except overspill.Error as error:
        return "spawn" in str(error)
    return False

def child(held):
    global model
    stream, unread, asked, batch, logits = held
    calls = {
        "next": lambda: next(stream),
        "next of a new one": lambda: next(unread),
        "next of a batch": lambda: next(batch),
        "stream": lambda: model.stream("x"),
        "generate": lambda: model.generate("x"),
        "generate_many": lambda: list(model.generate_many(["x"], max_tokens=1)),
        "eval": lambda: model.eval(tokens),
        "reset": model.reset,
        "add_rpc_server": lambda: overspill._core.add_rpc_server("127.0.0.1:1"),
    }
    for name, call in calls.items():
        if not refused(call):
            return name + " is not refused"
    try:
        if model.tokenize("Once upon a time") != tokens or not model.memory:
            return "other tokens"
    except overspill.Error as error:
        if "spawn" not in str(error):  # its lock may have been held
            return str(error)
    if sampler.sample(row) != 7 or [d.name for d in overspill.devices()] != ["CPU"]:
        return "another sample or device"
    with Model(path, **options) as own:  # loaded here, where its threads are
        if own.generate("Once", temperature=0, max_tokens=3).text != expected:
            return "another text"
    repr(stream), asked.shape
    stream.close(), unread.close(), model.close()
    del held, stream, unread, batch, logits, asked, model
    gc.collect()
    return ""

for number in range(n_forks):
    stream = model.stream("Once", max_tokens=100)
    next(stream)
    time.sleep(0.001)
    next(stream)  # now it looks ahead
    batch = model.generate_many(["a", "b", "c"], max_tokens=3, parallel=1)
    next(batch)
    held = [stream, model.stream("another"), model.eval(tokens, logits="all"), batch, model.logits]
    model.reset()
    pid = os.fork()
    if pid == 0:
        stream = batch = None
        wrong = child(held)
        if wrong:
            print(wrong, flush=True)
            os._exit(1)
        if ending == "os._exit":
            os._exit(0)
        sys.exit(0)  # as a program ends
    deadline = time.monotonic() + 60
    status = None
    while status is None and time.monotonic() < deadline:
        found, code = os.waitpid(pid, os.WNOHANG)
        status = code if found else time.sleep(0.01)
    if status is None:
        os.kill(pid, 9)
    assert status == 0, f"fork {number}: {'hangs' if status is None else status}"
    # The parent goes on as if nothing had happened.
    assert model.generate("Once", temperature=0, max_tokens=3).text == expected
    del held, stream, batch
over.set()
for thread in threads:
    thread.join()
print("parted")
"""


@pytest.mark.parametrize("ending", ["os._exit", "sys.exit"])
@pytest.mark.parametrize("n_forks", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_forks(tiny_gpt_oss_path: Path, ending: str, n_forks: int) -> None:
    """Whatever has threads is refused in the child, what has none works, and everything can be closed or dropped."""
    command = [sys.executable, "-W", "ignore", "-c", TRIAL, str(tiny_gpt_oss_path), ending, str(n_forks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=python_environment(**WITHOUT_GPU))
    assert (done.returncode, done.stdout) == (0, "parted\n"), done.stdout[-500:] + done.stderr[-2000:]


# Every public function, and what was opened before, in children that are forked at any moment of what threads do.
EVERYTHING = """
import asyncio, faulthandler, gc, os, random, signal, sys, threading, time
from pathlib import Path
import overspill
from overspill import _core
from test_arguments import World, public_callables, use

path, folder, n_forks, seed = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
os.chdir(folder)
HANG_S = 60
world = World(path, folder)
model, public = world.model, public_callables()
calls = {name: call for name, call in world.calls().items() if not isinstance(public[name], property)}
# Their models' threads are in the parent.
STEPS = {"Model.stream", "Model.generate", "Model.generate_many", "Model.eval", "Model.astream", "Model.chat",
         "Chat.send", "Chat.retry", "Cascade.stream", "Cascade.chat"}


def new_meter():
    return _core.DeviceMeter("CPU", n_threads=1, working_set_bytes=1 << 20, gpus=[], budget_s=0.0)


async def a_reply():
    async for _ in model.astream("Hello", max_tokens=3):
        pass


def load_for(cascade):
    with cascade._lock:  # as long as one of its models is loaded
        overspill.Model(path, n_ctx=64, n_threads=1, offload="cpu").close()


meter = new_meter()
cascade = overspill.Cascade(model, model)
form = model.chat_template.prepare("Hello").form
reader = form.new_reader()
WORK = [
    lambda: model.generate("Hello", max_tokens=5),
    lambda: list(model.chat("Hello", max_tokens=5)),
    lambda: overspill.Model(path, n_ctx=64, n_threads=1, offload="cpu").close(),
    lambda: overspill.Model(path, vocab_only=True).info.tensors,
    lambda: meter.operation_s(256),
    lambda: (overspill.devices(), overspill.plan(path, hardware=world.hardware)),
    lambda: asyncio.run(a_reply()),
    lambda: list(cascade.stream("Hello", max_tokens=2)),
    lambda: (reader.add("word " * 50), reader.is_malformed),
    lambda: load_for(cascade),
]
over = threading.Event()


def work(call):
    while not over.is_set():
        try:
            call()
        except overspill.Error as error:
            assert "in use" in str(error) or "middle of a step" in str(error), error


def outcome(call):
    # Nothing but a result or an error in words, and within the limit.
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    try:
        use(call())
    except (overspill.Error, ValueError) as error:
        return str(error)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return ""


def child(held):
    stream, unread, chat, batch, asynchronous = held
    refused = {name for name, (call, given) in calls.items() if "spawn" in outcome(lambda: call(**given))}
    assert STEPS <= refused, sorted(STEPS - refused)
    for call in (
        lambda: next(stream), lambda: next(unread), lambda: next(chat), lambda: next(batch),
        lambda: meter.operation_s(256), lambda: cascade.stream("Hello"), lambda: asyncio.run(asynchronous.__anext__()),
    ):
        assert "spawn" in outcome(call), outcome(call)
    for call in (
        lambda: (stream.stats, repr(stream)), lambda: (reader.add("a"), reader.finish(True), reader.is_malformed),
        lambda: model.tokenize("Hello"), overspill.devices, lambda: new_meter().operation_s(256),
        lambda: asyncio.run(asynchronous.aclose()), chat.close, stream.close, unread.close, batch.close, cascade.close,
        model.close,
    ):
        outcome(call)
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    del held, stream, unread, chat, batch, asynchronous
    gc.collect()


threads = [threading.Thread(target=work, args=(call,), daemon=True) for call in WORK]
for thread in threads:
    thread.start()
loop = asyncio.new_event_loop()
chance = random.Random(seed)
for number in range(n_forks):
    stream = model.stream("Hello", max_tokens=50)
    next(stream)
    chat, batch = model.chat("Hello", max_tokens=50), model.generate_many(["a", "b"], max_tokens=3, parallel=1)
    next(chat), next(batch)
    asynchronous = model.astream("Hello", max_tokens=50)
    loop.run_until_complete(asynchronous.__anext__())
    held = [stream, model.stream("another"), chat, batch, asynchronous]
    time.sleep(chance.random() * 0.1)
    pid = os.fork()
    if pid == 0:
        stream = chat = batch = asynchronous = None
        asyncio.set_event_loop(None)
        code = 1
        try:
            child(held)
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + 3 * HANG_S
    while not (found := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGABRT)
        time.sleep(0.01)
    assert found[1] == 0, f"fork {number}: {found[1]}"
    loop.run_until_complete(asynchronous.aclose())
    for one in held[:4]:
        one.close()
over.set()
for thread in threads:
    thread.join(HANG_S)
    assert not thread.is_alive()
print("parted", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("n_forks", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_forks_at_any_moment(tiny_gpt_oss_path: Path, tmp_path: Path, n_forks: int) -> None:
    """Whatever lock another thread has: each public call ends in the child, with a result or an Error."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        EVERYTHING,
        str(tiny_gpt_oss_path),
        str(tmp_path),
        str(n_forks),
        "1",
    ]
    environment = python_environment(Path(__file__).parents[1], XDG_CACHE_HOME=str(tmp_path), **WITHOUT_GPU)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert (done.returncode, done.stdout) == (0, "parted\n"), done.stdout[-500:] + done.stderr[-4000:]
