"""Signals and callbacks in the middle of a step: nothing waits for itself, and Ctrl-C is heard."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from programs import WITHOUT_GPU, python_environment
from sweeps import sweep

# What a handler or a callback may do, as functions of nothing; each works, or says that a step is under way.
CALLS = """
import gc, signal, sys, threading, time
import overspill
from overspill import Model

path, chosen = sys.argv[1], sys.argv[2]
PROMPT = [5] * 700
model = stream = None
other = Model(path, n_ctx=64, n_threads=1)

def begin():
    # `stream` is in the middle of a step in some of the cases.
    global model, stream
    model = Model(path, n_ctx=8192, n_batch=8192, n_threads=1)
    stream = model.stream(PROMPT, max_tokens=3)

def hold_the_turn():
    # A thread has the model's turn, for a batch of seconds, until the function that is returned is called.
    long = model.stream([5] * 8100, max_tokens=1)
    holder = threading.Thread(target=lambda: list(long), daemon=True)
    holder.start()
    time.sleep(0.1)
    def end():
        long.close()
        holder.join()
    return end

def drop_a_stream():
    dropped = model.stream("x")
    del dropped
    gc.collect()

CALLS = {
    "eval": lambda: model.eval([5]),
    "reset": lambda: model.reset(),
    "close": lambda: model.close(),
    "stream": lambda: model.stream("x"),
    "generate": lambda: model.generate("x", max_tokens=2),
    "generate_many": lambda: list(model.generate_many(["x"], max_tokens=2)),
    "next": lambda: next(stream, None),
    "stream.close": lambda: stream.close(),
    "stats": lambda: stream.stats,
    "tokenize": lambda: model.tokenize("x"),
    "memory": lambda: (model.memory, model.closed, repr(model)),
    "drop": drop_a_stream,
    "another model": lambda: other.generate("x", max_tokens=2),
    "load": lambda: Model(path, n_ctx=64, n_threads=1).close(),
    "devices": overspill.devices,
}

def attempt(name):
    try:
        CALLS[name]()
    except overspill.Error as error:
        assert "in the middle of a step" in str(error) or "closed" in str(error), (name, error)
    return name
"""

FROM_A_HANDLER = """
from itertools import product

def wait_for_a_turn(step):
    # Another thread has the turn until the handler is done.
    end = hold_the_turn()
    handled_now.append(end)
    try:
        signalled(step, after_s=0.2)
    finally:
        end()

def signalled(step, after_s=0.02):
    # Again and again, should a signal come too early.
    signal.setitimer(signal.ITIMER_REAL, after_s, 0.02)
    try:
        step()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)

STEPS = {
    "eval": lambda: signalled(lambda: model.eval(PROMPT)),
    "stream": lambda: signalled(lambda: next(stream, None)),
    "waiting stream": lambda: wait_for_a_turn(lambda: next(stream, None)),
    "waiting eval": lambda: wait_for_a_turn(lambda: model.eval([5])),
}
handled_now = []
for call in CALLS:
    begin()
    begun, handled = [], []
    def handler(*_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        if begun:  # a further signal came before the line above
            return
        begun.append(call)
        handled.append(attempt(call))
        for function in handled_now:
            function()
        handled_now.clear()
    signal.signal(signal.SIGALRM, handler)
    for _ in range(20):  # until the signal has come in its middle
        try:
            STEPS[chosen]()
        except overspill.Error as error:
            assert "closed" in str(error) or "interrupted" in str(error), (call, error)
        if handled:
            break
        begin()
    assert handled == [call], (handled, call)
    model.close()
print("heard")
"""

FROM_A_CALLBACK = """
import logging

class Dropped:
    def __init__(self, call): self.call = call
    def __del__(self): self.call()

def processor(call):
    list(model.stream("x", max_tokens=2, logits_processors=[lambda logits, tokens: call()]))

def sampler(call):
    list(model.stream("x", max_tokens=2, sampler=lambda logits, tokens: call()))

def progress(call):
    Model(path, n_ctx=64, n_threads=1, progress=lambda share: call()).close()

def finalizer(call):
    def drop(logits, tokens):
        circle = [Dropped(call)]
        circle.append(circle)
        del circle
        gc.collect()
    list(model.stream("x", max_tokens=2, logits_processors=[drop]))

def logger(call):
    class Handler(logging.Handler):
        def emit(self, record): call()
    log = logging.getLogger("overspill.llama")
    log.setLevel(logging.DEBUG)
    log.addHandler(handler := Handler())
    try:
        Model(path, n_ctx=64, n_threads=1).close()
    finally:
        log.removeHandler(handler)

for name in CALLS:
    begin()
    done = []
    def once():
        if not done:
            done.append(name)
            attempt(name)
    globals()[chosen](once)
    assert done == [name]
    model.close()
print("heard")
"""

# Each waits for a turn that another thread does not give back before Ctrl-C has been heard.
INTERRUPTED = """
import os

signal.signal(signal.SIGINT, signal.default_int_handler)
WAITING = ["eval", "generate", "generate_many", "next"]

for name in WAITING:
    begin()
    end = hold_the_turn()
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        CALLS[name]()
    except KeyboardInterrupt:
        timer.join()
    else:
        raise AssertionError(name + " was not interrupted")
    end()
    assert model.generate("x", max_tokens=2).tokens
    model.close()
print("heard")
"""


def run(script: str, *arguments: str) -> None:
    """Run it in a process of its own, which must come to its end."""
    command = [sys.executable, "-c", CALLS + script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=python_environment(**WITHOUT_GPU))
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr[-2000:]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no timers that signal")
@pytest.mark.parametrize("step", sweep(["eval", "stream", "waiting stream", "waiting eval"], always=[]))
def test_calls_in_a_signal_handler(tiny_gpt_oss_path: Path, step: str) -> None:
    """During a step, and while one waits for its turn: every call works or is refused in one line."""
    run(FROM_A_HANDLER, str(tiny_gpt_oss_path), step)


@pytest.mark.parametrize("place", sweep(["processor", "sampler", "progress", "finalizer", "logger"], always=[0]))
def test_calls_in_a_callback(tiny_gpt_oss_path: Path, place: str) -> None:
    """The same where the library calls the caller's code, or the interpreter a finalizer."""
    run(FROM_A_CALLBACK, str(tiny_gpt_oss_path), place)


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill() does not interrupt on Windows")
def test_ctrl_c_while_another_stream_has_its_turn(tiny_gpt_oss_path: Path) -> None:
    """Whoever waits for a turn gives up, and the model is none the worse."""
    run(INTERRUPTED, str(tiny_gpt_oss_path), "")


# The interpreter ends threads that ask for the GIL by then; in the middle of C++, that would end the process.
DAEMONS = """
def work():
    while True:
        try:
            model.generate("Hello", max_tokens=20)
        except overspill.Error:
            Model(path, vocab_only=True).tokenize("word " * 1000)

model = Model(path, n_ctx=512, n_threads=1)
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
print("heard")
"""


@pytest.mark.parametrize("again", sweep(range(4), always=[0]))
def test_a_program_ends_beside_daemon_threads(tiny_gpt_oss_path: Path, again: int) -> None:
    """In good order, whatever they are in the middle of."""
    run(DAEMONS, str(tiny_gpt_oss_path), "")
