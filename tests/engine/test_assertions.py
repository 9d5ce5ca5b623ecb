"""A failed assertion of llama.cpp ends the model that it failed in, and nothing else.

A library that is preloaded (``upstream/failing_assertions.cpp``) makes one fail wherever a test asks for it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from programs import WITHOUT_GPU, python_environment
from sweeps import sweep as sweep_cases

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="functions are replaced by LD_PRELOAD")

N_PLACES = 100
"""Of each case."""
SWEEP = """
import ctypes, os, pathlib, random, sys
import overspill

library, path, offload = sys.argv[1:4]
n_threads, n_streams, n_places, seed = map(int, sys.argv[4:])
places = ctypes.CDLL(library)
places.calls_made.restype = places.failures.restype = ctypes.c_int64
CALLER, WORKER = 0, 1
draw = random.Random(seed)


def fail_after(who, n):
    places.fail_after(who, ctypes.c_int64(n))


def take(model):
    # Two tokens of each stream in turn; then the first one's context is gone back to.
    streams = [model.stream([5 + i, 6, 7, 8], temperature=0, max_tokens=3) for i in range(n_streams)]
    for _ in range(3):
        for stream in streams:
            next(stream)
    for stream in streams:
        stream.close()
    return [token.id for token in model.stream([5, 6, 7, 9], temperature=0, max_tokens=2)]


def n_threads_of_process():
    return len(os.listdir("/proc/self/task"))


options = {"n_ctx": 64, "n_threads": n_threads, "offload": offload}
if offload != "cpu":
    from upstream_tools import stand_in_gpu
    stand_in_gpu(pathlib.Path(library).parent, "GPU0", 1 << 30)
    options["offload"] = int(offload)
other = overspill.Model(path, **options)
expected = take(other)
at_rest = n_threads_of_process()
n_calls = []
for who in (CALLER, WORKER):
    with overspill.Model(path, **options) as model:
        before = places.calls_made(who)
        assert take(model) == expected
        n_calls.append(places.calls_made(who) - before)
assert n_calls[CALLER] > 50 and (n_threads == 1 or n_calls[WORKER] > 50)
for i in range(n_places):
    who = draw.choice([CALLER, WORKER]) if n_threads > 1 else CALLER
    model = overspill.Model(path, **options)
    # Streams look ahead, and may compute less when they are closed early.
    place = draw.randrange(n_calls[who] * 3 // 4)
    n_failures = places.failures()
    fail_after(who, place)
    try:
        take(model)
    except overspill.UnusableError as error:
        first = str(error)
        assert "made to fail on a " + ("caller", "worker")[who] in first and path in first, first
    except overspill.Error as error:
        # While a context was made, which has harmed nothing else.
        assert "made to fail on a caller" in str(error), error
        assert take(model) == expected
        first = None
    else:
        fail_after(who, -1)
        if places.failures() > n_failures:
            # While places were made for streams that came together, which do without.
            assert take(model) == expected
        first = None
    if first is not None:
        for call in (
            lambda: model.stream([1], max_tokens=1),
            lambda: model.eval([1, 2]),
            lambda: model.tokenize("a"),
            lambda: model.generate([1], max_tokens=1),
            lambda: model.generate_many([[1], [2]], max_tokens=1),
        ):
            try:
                call()
            except overspill.UnusableError as error:
                assert str(error) == first, (str(error), first)
            else:
                raise AssertionError("an unusable model was used")
    if i % 5 == 0 or i == n_places - 1:  # its threads spin for a while afterwards
        assert take(other) == expected
    model.close()
    del model
    assert n_threads_of_process() == at_rest, (n_threads_of_process(), at_rest)
print(places.failures())
"""


def sweep(tools: Path, path: Path, n_threads: int, n_streams: int, n_places: int, offload: str = "cpu") -> int:
    """Return how many assertions have failed, each as it should."""
    (library,) = tools.glob("*failing_assertions.*")
    command = [sys.executable, "-c", SWEEP, str(library), str(path), offload]
    command += map(str, (n_threads, n_streams, n_places, 1))
    environment = python_environment(LD_PRELOAD=str(library), **WITHOUT_GPU)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("n_streams", [1, 2, 3])
@pytest.mark.parametrize("n_threads", [1, 2, 3, 4])
def test_every_place_of_a_decode(upstream_tools: Path, tiny_gpt_oss_path: Path, n_threads: int, n_streams: int) -> None:
    """Wherever it fails, the model is unusable with the reason, no thread stays, and another model answers right."""
    assert sweep(upstream_tools, tiny_gpt_oss_path, n_threads, n_streams, N_PLACES) >= N_PLACES // 2


def test_some_places_of_a_decode(upstream_tools: Path, tiny_gpt_oss_path: Path) -> None:
    """The same for few places, so that it is seen often."""
    assert sweep(upstream_tools, tiny_gpt_oss_path, min(2, os.cpu_count() or 1), 2, 6) > 2


def test_beside_a_gpu(upstream_tools: Path, tiny_gpt_oss_path: Path) -> None:
    """A model with layers on a GPU is not freed after a failure; the process goes on all the same."""
    assert sweep(upstream_tools, tiny_gpt_oss_path, 1, 1, 10, offload="2") > 4


ENDING = """
import ctypes, sys, threading
import overspill

library, path, who, where, n_threads = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
places = ctypes.CDLL(library)
with overspill.Model(path, n_ctx=64, n_threads=n_threads, offload="cpu") as model:
    model.generate([5, 6, 7], max_tokens=1)
    places.fail_in(where)
    if where == 3:
        places.fail_here()
    places.fail_after(who, ctypes.c_int64(40))
    model.generate([5, 6, 7], max_tokens=3)
"""


@pytest.mark.parametrize(
    ("who", "where", "activity"),
    sweep_cases([(0, 1, "decoding"), (0, 2, "decoding"), (0, 3, "idle"), (1, 1, "decoding")], always=[3]),
)
def test_the_last_words(upstream_tools: Path, tiny_gpt_oss_path: Path, who: int, where: int, activity: str) -> None:
    """Where nothing can be thrown, one line says what was being done and what failed, each once."""
    (library,) = upstream_tools.glob("*failing_assertions.*")
    command = [sys.executable, "-c", ENDING, str(library), str(tiny_gpt_oss_path), str(who), str(where), str(1 + who)]
    environment = python_environment(LD_PRELOAD=str(library), **WITHOUT_GPU)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == -signal.SIGABRT, done.stderr[-2000:]
    (line,) = (line for line in done.stderr.splitlines() if "made to fail" in line)
    failed = rf"\S+failing_assertions\.cpp:\d+: made to fail on a {('caller', 'worker')[who]}"
    assert re.fullmatch(f"overspill: llama.cpp failed while {activity}: {failed}; this ends the process", line), line


METER = """
import ctypes, gc, pathlib, sys
import overspill
from overspill import _core
from upstream_tools import stand_in_gpu

library = sys.argv[1]
places = ctypes.CDLL(library)
places.calls_made.restype = ctypes.c_int64
stand_in_gpu(pathlib.Path(library).parent, "GPU0", 1 << 30)
MEASURES = [
    lambda meter: meter.weight_rate("f16", 256, 256, 0, 0),
    lambda meter: meter.batch_flops("f16", 256, 256, 0, 0, 8),
    lambda meter: meter.attention_bytes_per_s("f16", 4, 2, 64, 256),
    lambda meter: meter.operation_s(256),
    lambda meter: meter.visit_s(256),
    lambda meter: meter.link_rates(1 << 16, False),
]


def free_bytes():
    gc.collect()
    return next(device.free_bytes for device in overspill.devices() if device.name == "GPU0")


def attempt(measure, device, n):
    meter = _core.DeviceMeter(device, n_threads=1, working_set_bytes=1 << 20, gpus=[], budget_s=0.0)
    before = places.calls_made(0)
    places.fail_after(0, ctypes.c_int64(n))
    try:
        measure(meter)
    except overspill.UnusableError as error:
        assert "made to fail on a caller" in str(error) and f"meter of {device}" in str(error), error
        for again in MEASURES:
            try:
                again(meter)
            except overspill.UnusableError:
                continue
            assert again(meter) is not None and device == "CPU", "an unusable meter was used"
        return True
    finally:
        places.fail_after(0, ctypes.c_int64(-1))
    return False


n_failed = 0
for device in ("GPU0", "CPU"):
    for measure in MEASURES:
        for n in (1, 2, 5):  # before the first, some have taken no memory yet
            before = free_bytes()
            failed = attempt(measure, device, n)
            n_failed += failed
            # What the GPU's driver would fail to free is left to it.
            assert (free_bytes() < before) == (failed and device == "GPU0"), (device, n, failed)
print(n_failed)
"""


def test_a_meter_beside_a_gpu(upstream_tools: Path) -> None:
    """It is unusable after a failure, keeps what a GPU holds, and the process goes on."""
    (library,) = upstream_tools.glob("*failing_assertions.*")
    environment = python_environment(LD_PRELOAD=str(library), **WITHOUT_GPU)
    command = [sys.executable, "-c", METER, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 12
