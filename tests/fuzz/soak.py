"""Minutes of random use from several threads: ``python tests/fuzz/soak.py MODEL.gguf --minutes 5 --seed 1``.

Four threads load, stream, cancel, evaluate, batch and close models of a small file, while servers of devices come and
go and signals arrive. Only the errors that an operation is known for may come. In the end, nothing may be left waiting,
threads and descriptors are as many as at the beginning, and memory is within a fifth of what it was after the first
minute. The exit code is 0 if all of that holds.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import os
import random
import resource
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import overspill
from overspill import Model
from rpc_server import free_port, start_server

N_THREADS = 4
HANG_S = 120.0
RESULT, REFUSED = 0, 3
"""The exit codes of a child with little memory."""
OPTIONS: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "offload": "cpu"}


def resident_bytes() -> int:
    """Return the memory of this process, less what the C library keeps for later."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))


def n_threads() -> int:
    """Return the threads of this process."""
    return len(list(Path("/proc/self/task").iterdir()))


def n_descriptors() -> int:
    """Return what this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


class Soak:
    """What the threads share."""

    def __init__(self, path: Path, seed: int) -> None:
        """Load the model that all of them use at once."""
        self.path = path
        self.seed = seed
        self.over = threading.Event()
        self.failures: list[str] = []
        self.counts: Counter[str] = Counter()
        self.busy_since = [time.monotonic()] * N_THREADS
        self.shared = Model(path, **OPTIONS)
        # A few endpoints, since devices stay for the life of the process; and one server runs at a time.
        self.ports = [free_port() for _ in range(2)]
        self.serving = threading.Lock()

    # --- the operations, each with a source of random numbers

    def model(self, random: random.Random) -> Model:
        """Return the model of all threads, loaded anew when somebody has closed it."""
        model = self.shared
        if model.closed:
            model = self.shared = Model(self.path, **OPTIONS)
        return model

    def prompt(self, random: random.Random) -> list[int]:
        """Return up to a few batches of any tokens."""
        return [random.randrange(1, 200) for _ in range(random.choice([1, 3, 40, 300]))]

    def stream(self, random: random.Random) -> None:
        """Take some tokens, and leave the stream in one of the ways."""
        stream = self.model(random).stream(
            self.prompt(random), max_tokens=20, seed=random.randrange(100), reuse=random.random() < 0.3
        )
        for _ in range(random.randrange(6)):
            if next(stream, None) is None:
                break
            if random.random() < 0.3:
                time.sleep(0.001)  # it looks ahead
        match random.randrange(3):
            case 0:
                stream.close()
            case 1:
                list(stream)

    def cancel(self, random: random.Random) -> None:
        """Close a stream while it steps."""
        stream = self.model(random).stream(self.prompt(random), max_tokens=50)
        timer = threading.Timer(random.random() * 0.05, stream.close)
        timer.start()
        list(stream)
        timer.join()

    def choose(self, random: random.Random) -> None:
        """Let Python take part, and fail now and then."""
        fails = random.random() < 0.3

        def edit(logits: object, tokens: object) -> None:
            if fails:
                raise ZeroDivisionError

        try:
            self.model(random).generate(self.prompt(random), max_tokens=5, logits_processors=[edit])
        except ZeroDivisionError:
            assert fails

    def grammar(self, random: random.Random) -> None:
        """Constrain a reply."""
        text = self.model(random).generate("x", max_tokens=5, grammar="root ::= [a-z]+").text
        assert text == "" or (text.isalpha() and text.islower()), text

    def evaluate(self, random: random.Random) -> None:
        """Decode by hand, on a model of this thread's own: views of another's would be in use."""
        with Model(self.path, **OPTIONS) as model:
            for _ in range(3):
                row = model.eval(self.prompt(random)[:100], logits=random.choice(["last", "all"]))
                assert bool((row == row).all())
                del row
                if random.random() < 0.5:
                    model.reset()

    def batch(self, random: random.Random) -> None:
        """Decode many at once; leave some batches in their middle."""
        n = random.randrange(1, 6)
        replies = self.model(random).generate_many(
            [self.prompt(random) for _ in range(n)], max_tokens=4, parallel=random.randrange(1, 4)
        )
        for number, _ in enumerate(replies):
            if number == 2:
                break
        replies.close()  # type: ignore[attr-defined]

    def close(self, random: random.Random) -> None:
        """Close the model of all threads under them, now and then."""
        if random.random() < 0.2:
            self.shared.close()

    def cancel_loading(self, random: random.Random) -> None:
        """End a load in its middle."""
        until = random.random()
        try:
            Model(self.path, **OPTIONS, progress=lambda share: share < until).close()
        except overspill.CancelledError:
            return
        raise AssertionError("not cancelled")

    def serve(self, random: random.Random) -> None:
        """Use the device of another process, which dies or hangs for a moment in the middle of it, or does not."""
        if not self.serving.acquire(blocking=False):
            return
        try:
            port = random.choice(self.ports)
            server = start_server(port)
            how = random.choice(["lives", "dies", "hangs"])
            timer = threading.Timer(
                random.random(),
                {
                    "lives": lambda: None,
                    "dies": server.kill,
                    "hangs": lambda: server.send_signal(signal.SIGSTOP),
                }[how],
            )
            again = threading.Timer(1.5, lambda: server.send_signal(signal.SIGCONT))
            timer.start()
            again.start()
            try:
                options = OPTIONS | {"offload": random.choice([1, 3, "gpu"])}
                with Model(self.path, rpc=[f"127.0.0.1:{port}"], **options) as model:
                    for _ in range(5):
                        model.generate(self.prompt(random), max_tokens=5)
            except overspill.Error as error:
                if how != "dies" or "RPC server" not in str(error):
                    raise
            finally:
                timer.join()
                again.join()
                server.kill()
                server.communicate()
        finally:
            self.serving.release()

    def little_memory(self, random: random.Random) -> None:
        """Fork a child that has too little memory, and only that: it ends with a result, or with an error."""
        room = random.randrange(1 << random.randrange(14, 27))
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                status = Path("/proc/self/status").read_text()
                used = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmSize:"))
                resource.setrlimit(resource.RLIMIT_AS, (1024 * used + room,) * 2)
                with Model(self.path, **OPTIONS) as model:
                    model.generate("x", max_tokens=3)
                code = RESULT
            except (overspill.Error, MemoryError):
                code = REFUSED
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        deadline = time.monotonic() + HANG_S / 2
        while not (found := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise AssertionError("a child with little memory hangs")
            time.sleep(0.01)
        code = os.waitstatus_to_exitcode(found[1])
        if code not in (RESULT, REFUSED):
            raise AssertionError(f"a child with {room} bytes of memory ended with {code}")
        self.counts[f"children with little memory: {'a result' if code == RESULT else 'an error'}"] += 1

    def work(self, number: int) -> None:
        """Do random operations until the time is over."""
        source = random.Random(self.seed * 1000 + number)
        operations: list[tuple[Callable[[random.Random], None], int]] = [
            *[(self.stream, 8), (self.cancel, 4), (self.choose, 3), (self.grammar, 2), (self.evaluate, 2)],
            *[(self.batch, 4), (self.close, 2), (self.cancel_loading, 1), (self.serve, 1), (self.little_memory, 1)],
        ]
        functions, weights = zip(*operations, strict=True)
        while not self.over.is_set():
            (operation,) = source.choices(functions, weights)
            self.busy_since[number] = time.monotonic()
            try:
                operation(source)
                self.counts[operation.__name__] += 1
            except overspill.ClosedError:
                self.counts["closed under it"] += 1
            except BaseException:
                self.failures.append(f"{operation.__name__}:\n{traceback.format_exc()}")
                self.over.set()


def main() -> int:
    """Run it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    faulthandler.enable()
    n_alarms = [0]

    def count_alarm(number: int, frame: object) -> None:
        n_alarms[0] += 1

    may_interrupt = [False]

    def interrupt(number: int, frame: object) -> None:
        if may_interrupt[0]:
            may_interrupt[0] = False
            raise KeyboardInterrupt

    Model(arguments.model, **OPTIONS).close()  # what is made once stays
    at_first = n_threads(), n_descriptors()
    soak = Soak(arguments.model, arguments.seed)
    signal.signal(signal.SIGALRM, count_alarm)
    signal.signal(signal.SIGINT, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    threads = [threading.Thread(target=soak.work, args=(number,), daemon=True) for number in range(N_THREADS)]
    for thread in threads:
        thread.start()
    end_at = time.monotonic() + 60 * arguments.minutes
    settled_at = min(time.monotonic() + 60, end_at - 1)
    settled = 0
    source = random.Random(arguments.seed)
    while not soak.over.is_set() and time.monotonic() < end_at:
        # The main thread uses the model as well, and is interrupted.
        timer = threading.Timer(source.random() * 0.5, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            try:
                may_interrupt[0] = True
                soak.model(source).generate(soak.prompt(source), max_tokens=200)
            finally:
                may_interrupt[0] = False
        except (KeyboardInterrupt, overspill.ClosedError):
            soak.counts["interrupted"] += 1
        timer.join()
        if not settled and time.monotonic() > settled_at:
            settled = resident_bytes()
        if time.monotonic() - min(soak.busy_since) > HANG_S:
            soak.failures.append("an operation hangs")
            break
    soak.over.set()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for thread in threads:
        thread.join(HANG_S)
        if thread.is_alive():
            soak.failures.append(f"{thread.name} does not come to its end")
            faulthandler.dump_traceback(all_threads=True)
            break
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(dict(soak.counts), f"{n_alarms[0]} signals")
    if not soak.failures:
        soak.shared.close()
        del threads, thread
        grown = resident_bytes() / max(1, settled)
        at_last = n_threads(), n_descriptors()
        print(f"memory {grown:.2f} times what it was; threads and descriptors {at_first}, then {at_last}")
        if grown > 1.2 or at_last[0] > at_first[0] or at_last[1] > at_first[1]:
            soak.failures.append("something is left behind")
    for failure in soak.failures:
        print(failure)
    sys.stdout.flush()
    os._exit(1 if soak.failures else 0)  # without waiting for what hangs


if __name__ == "__main__":
    sys.exit(main())
