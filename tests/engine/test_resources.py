"""What streams and models leave behind: nothing."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(
        sys.platform != "linux" or platform.libc_ver()[0] != "glibc",
        reason="reads /proc/self/status, and trims glibc's heap",
    ),
    # A GPU's driver has threads and memory of its own; tests/gpu looks at what a model leaves there.
    pytest.mark.usefixtures("no_gpu"),
]

# Runs alone, for a clean reading of the process's memory and threads.
READINGS = """
import ctypes, gc, sys
import overspill

def reading(name):
    gc.collect()
    # What is free, but kept by the allocator for later, comes and goes in steps of a model's size.
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name + ":"))

threads_before = reading("Threads")
"""

STREAMS = """
model = overspill.Model(sys.argv[1], n_ctx=512, n_threads=2)
threads_loaded = reading("Threads")

def cycle(number):
    stream = model.stream("Once upon a time", seed=number)
    match number % 5:
        case 0:
            for token in stream:
                break
        case 1:
            next(stream)
            stream.close()
        case 2:
            with stream:
                next(stream)
        case 3:
            another = model.stream("Another one, at the same time")
            next(stream), next(another)
        case 4:
            pass  # opened and never read

for number in range(50):
    cycle(number)
before = reading("VmRSS")
for number in range(500):
    cycle(number)
grown = reading("VmRSS") - before
assert grown < 5 * 1024, f"resident memory grew by {grown} KiB in 500 cycles"
assert reading("Threads") == threads_loaded, "an abandoned stream left a thread behind"
model.close()
assert reading("Threads") == threads_before, "a closed model left a thread behind"
print("flat")
"""

MODELS = """
def cycle(number):
    model = overspill.Model(sys.argv[1], n_ctx=512, n_threads=2, load_mode="read")
    stream = model.stream("Once upon a time")
    next(stream)
    if number % 2:
        model.close()

for number in range(10):
    cycle(number)
before = reading("VmRSS")
for number in range(60):
    cycle(number)
grown = reading("VmRSS") - before
assert grown < 1024, f"resident memory grew by {grown} KiB in 60 loads"
assert reading("Threads") == threads_before, "a model left a thread behind"
print("flat")
"""


@pytest.mark.parametrize("cycles", [STREAMS, MODELS], ids=["streams", "models"])
def test_nothing_is_left_behind(tiny_gpt_oss_path: Path, cycles: str) -> None:
    """Hundreds of streams and dozens of models, left in every way, cost no memory and no thread."""
    command = [sys.executable, "-c", READINGS + cycles, str(tiny_gpt_oss_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "flat\n"), done.stderr[-1000:]


CHAT = """
model = overspill.Model(sys.argv[1], n_ctx=512, n_threads=2, load_mode="read")
template = model.chat_template
for token in model.chat("Hello", max_tokens=4):
    pass
many = model.generate_many(["a", "b"], max_tokens=4, parallel=1)
next(many)
loaded = reading("VmRSS")
model.close()
freed = loaded - reading("VmRSS")
assert freed > 80 * 1024, f"a model of 92 MiB that chatted gave back {freed} KiB"
assert list(many) == []
try:
    template.render("Hello")
except overspill.ClosedError:
    print("flat")
"""


def test_a_model_that_chatted_is_freed(smollm2_path: Path) -> None:
    """Neither its template nor a batch that was left keeps its weights."""
    command = [sys.executable, "-c", READINGS + CHAT, str(smollm2_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "flat\n"), done.stderr[-1000:]
