"""What streams and models leave behind: nothing."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type

from architectures import tiny
from header_files import dense, of_type, write_random_model
from model_fixtures import N_THREADS
from overspill._core import cpu_kernels
from sweeps import sweep

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


# Children of one process, each with another limit: to import the library anew would take most of the time.
LIMITED = """
import os, resource, sys, time
import overspill
from overspill import Model

path, chosen, factor = sys.argv[1], sys.argv[2], float(sys.argv[3])
options = {"n_ctx": 2048, "n_threads": 2, "load_mode": "read", "repack": "off", "offload": "cpu"}

def limit(n_bytes):
    with open("/proc/self/status") as status:
        used = next(1024 * int(line.split()[1]) for line in status if line.startswith("VmSize:"))
    resource.setrlimit(resource.RLIMIT_AS, (used + n_bytes, resource.RLIM_INFINITY))

def use(n_bytes):
    if chosen == "load":
        limit(n_bytes)
        Model(path, **options).generate("x", max_tokens=1)
        return
    model = Model(path, **options)
    limit(n_bytes)
    if chosen == "stream":
        streams = [model.stream("x", max_tokens=2), model.stream("y", max_tokens=2)]
        for stream in streams:
            list(stream)
    elif chosen == "batch":
        list(model.generate_many(["a b c"] * 8, max_tokens=4, parallel=8))
    else:
        model.eval(list(range(1, 300)), logits="all")

def outcome(n_bytes):
    try:
        use(n_bytes)
    except (overspill.OutOfMemoryError, MemoryError):
        return 3
    except overspill.Error as error:
        if "does not give 2 threads" in str(error):  # their stacks are memory
            return 3
        os.write(2, f"{n_bytes}: {type(error).__name__}: {error}".encode())
        return 4
    return 0

codes, n_bytes = [], 20_000
while n_bytes < 1 << 29:
    pid = os.fork()
    if pid == 0:
        code = 5
        try:
            code = outcome(n_bytes)
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    while not (found := os.waitpid(pid, os.WNOHANG))[0]:
        assert time.monotonic() < deadline or os.kill(pid, 9), f"{n_bytes} hangs"
        time.sleep(0.005)
    codes.append(found[1] >> 8 if os.WIFEXITED(found[1]) else -found[1])
    assert codes[-1] in (0, 3), f"{n_bytes} bytes: {codes[-1]}"
    n_bytes = int(n_bytes * factor)
assert codes[0] == 3 and codes[-1] == 0, codes
print("flat")
"""


@pytest.mark.parametrize(
    ("call", "factor"),
    [
        ("load", 12),
        *(pytest.param(call, 1.1, marks=pytest.mark.slow) for call in ("load", "stream", "batch", "eval")),
    ],
)
def test_little_memory(tiny_gpt_oss_path: Path, call: str, factor: float) -> None:
    """From little to enough: too little is an OutOfMemoryError, wherever it is noticed, and the process goes on."""
    command = [sys.executable, "-W", "ignore", "-c", LIMITED, str(tiny_gpt_oss_path), call, str(factor)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "flat\n"), done.stderr[-1500:]


# Now and then the process is forked in the middle of a stream, and the child loads a model of its own.
LOADS = """
import os
from threading import Event, Thread

*paths, n_threads, n_loads = sys.argv[1:]
options = {"n_ctx": 64, "n_threads": 1, "offload": "cpu", "repack": "off", "kernels": "auto"}

def load(number):
    # Threads that wait for each other take long where there are more than cores.
    threads = {"n_threads": int(n_threads)} if number % 10 == 5 else {}
    with overspill.Model(paths[number % len(paths)], **options | threads) as model:
        model.eval([1, 2, 3])
        model.eval([4])

def stream(model, is_streaming, over):
    while not over.is_set():
        for token in model.stream([1, 2, 3], max_tokens=32):
            is_streaming.set()

def fork(model, number):
    is_streaming, over = Event(), Event()
    thread = Thread(target=stream, args=(model, is_streaming, over))
    thread.start()
    is_streaming.wait()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            load(number)
            code = 0
        finally:
            os._exit(code)
    over.set()
    thread.join()
    assert os.waitpid(pid, 0)[1] == 0, f"the child of load {number}"

def use(n):
    with overspill.Model(paths[0], **options) as model:
        for number in range(n):
            load(number)
            if number % 20 == 0:
                fork(model, number)
    return reading("VmRSS"), reading("Threads"), len(os.listdir("/proc/self/fd"))

before = use(100)
after = use(int(n_loads))
print(f"{n_loads} loads: KiB, threads, descriptors {before}, then {after}", file=sys.stderr)
assert after[0] - before[0] < 1024, "memory"
assert after[1:] == before[1:], "threads or descriptors"
print("flat")
"""


@pytest.mark.skipif(cpu_kernels() == "llama.cpp", reason="this CPU has no kernels of ours")
@pytest.mark.slow
def test_many_loads_leave_nothing_behind(tmp_path: Path) -> None:
    """Models that our kernels compute, loaded, used and closed, with forks in the middle of streams."""
    paths = [
        write_random_model(tmp_path / name, tiny(name), vocabulary=False) for name in ("qwen2", "llama", "smallthinker")
    ]
    command = [sys.executable, "-W", "ignore", "-c", READINGS + LOADS, *map(str, paths), str(N_THREADS), "1000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert (done.returncode, done.stdout) == (0, "flat\n"), done.stderr[-1000:]


# What a model takes, after tokens one by one and after a prompt.
TAKEN = """
before = reading("VmRSS")
options = {"offload": "cpu", "n_ctx": 512, "n_threads": 1, "kernels": sys.argv[2], "repack": sys.argv[3]}
model = overspill.Model(sys.argv[1], **options)
for token in range(8):
    model.eval([token])
print(1024 * (reading("VmRSS") - before))
model.eval(list(range(100)))
print(1024 * (reading("VmRSS") - before))
"""


@pytest.mark.skipif(cpu_kernels() == "llama.cpp", reason="this CPU has no kernels of ours")
@pytest.mark.parametrize(
    "kind", sweep([Type[name] for name in ("Q4_0", "Q4_K", "MXFP4")], [0]), ids=lambda kind: kind.name
)
def test_kernels_take_no_memory(tmp_path: Path, kind: Type) -> None:
    """Weights stay as they are in the file: beside them, there are the activations of a product."""
    width, ffn_width = 1024, 3072
    header = dense(
        "llama",
        n_layers=4,
        width=width,
        ffn_width=ffn_width,
        n_heads=8,
        n_heads_kv=2,
        n_vocab=8192,
        n_ctx=512,
        rope_freq_base=1e4,
    )
    header = of_type(header, kind)
    path = write_random_model(tmp_path / "model.gguf", header, vocabulary=False)

    def taken(kernels: str, repack: str) -> tuple[int, int]:
        command = [sys.executable, "-c", READINGS + TAKEN, str(path), kernels, repack]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        after_tokens, after_prompt = map(int, done.stdout.split())
        return after_tokens, after_prompt

    ours, theirs, copied = taken("auto", "off"), taken("llama.cpp", "off"), taken("llama.cpp", "on")
    assert min(theirs) > header.tensor_bytes
    assert copied[0] - theirs[0] > header.tensor_bytes // 2, "copies would not be seen"
    assert ours[0] - theirs[0] < header.tensor_bytes // 100
    # Two bytes for each activation of the widest products at most, and never as much as the smallest copy.
    assert ours[1] - theirs[1] < 2 * 100 * (width + ffn_width) + (1 << 20) < header.tensor_bytes // 10


ARENAS = """
from threading import Thread

def load():
    for _ in range(2):
        with overspill.Model(sys.argv[1], n_ctx=128, n_threads=1, load_mode="read") as model:
            next(model.stream("x"))

load()
before = reading("VmRSS")
threads = [Thread(target=load) for _ in range(12)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
grown = reading("VmRSS") - before
assert grown < 64 * 1024, f"resident memory grew by {grown} KiB in 24 loads by 12 threads"
print("flat")
"""


@pytest.mark.slow
def test_threads_that_load_leave_little_behind(tiny_gpt_oss_path: Path) -> None:
    """The C library's arenas keep what was freed in them, of which each thread may have one."""
    command = [sys.executable, "-c", READINGS + ARENAS, str(tiny_gpt_oss_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "flat\n"), done.stderr[-1000:]


# There is room for what is measured with, and none for the stacks of threads.
NO_THREADS = """
import resource
limit = 1024 * reading("VmSize") + (4 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
try:
    overspill._core.DeviceMeter("CPU", n_threads=4, working_set_bytes=1 << 20, gpus=[], budget_s=0.0)
except overspill.Error as error:
    text = str(error)
    assert "does not give 4 threads" in text and "Success" not in text and "unavailable" not in text, text
    print("flat")
"""


def test_no_more_threads() -> None:
    """One line says so and what to do, without the system's own words around it."""
    command = [sys.executable, "-c", READINGS + NO_THREADS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "flat\n"), done.stderr[-1000:]
