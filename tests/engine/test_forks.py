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
