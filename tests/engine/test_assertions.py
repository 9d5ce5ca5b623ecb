"""A failed assertion of llama.cpp ends the model that it failed in, and nothing else.

A library that is preloaded (``upstream/failing_assertions.cpp``) makes one fail wherever a test asks for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from overspill.base.host import logical_cpus
from programs import WITHOUT_GPU, python_environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="functions are replaced by LD_PRELOAD")

N_PLACES, N_PLACES_WITHOUT_CORES = 20, 2
"""Of each case. More threads than cores, which spin, take many seconds for a place."""
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
        assert places.failures() == n_failures
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
    n_places = N_PLACES
    if n_threads > logical_cpus() and "OVERSPILL_TEST_PLACES" not in os.environ:
        n_places = N_PLACES_WITHOUT_CORES
        if n_streams != n_threads - 2:
            pytest.skip("too few cores; OVERSPILL_TEST_PLACES=2 tries it all the same")
    n_places = int(os.environ.get("OVERSPILL_TEST_PLACES", n_places))
    assert sweep(upstream_tools, tiny_gpt_oss_path, n_threads, n_streams, n_places) >= n_places // 2


def test_some_places_of_a_decode(upstream_tools: Path, tiny_gpt_oss_path: Path) -> None:
    """The same for few places, so that it is seen often."""
    assert sweep(upstream_tools, tiny_gpt_oss_path, min(2, os.cpu_count() or 1), 2, 6) > 2


def test_beside_a_gpu(upstream_tools: Path, tiny_gpt_oss_path: Path) -> None:
    """A model with layers on a GPU is not freed after a failure; the process goes on all the same."""
    assert sweep(upstream_tools, tiny_gpt_oss_path, 1, 1, 10, offload="2") > 4
