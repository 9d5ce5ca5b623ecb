"""Streams for asyncio: the same tokens, a loop that is never blocked, and an end whenever it is wanted."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import overspill
from overspill import AsyncStream, Model, StopReason, Token
from rounding import is_same
from sweeps import sweep

# A step that is to be ended takes long on a CPU, and not on a GPU.
pytestmark = pytest.mark.usefixtures("no_gpu")

PROMPT = "Once upon a time"
LONG_PROMPT = "word " * 4000


def greedy(model: Model, prompt: str = PROMPT) -> overspill.Completion:
    """Return a reply that is the same each time."""
    return model.generate(prompt, temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def slow(gemma_path: Path) -> Iterator[Model]:
    """Return a model that takes long for ``LONG_PROMPT``, and takes it in one step."""
    with Model(gemma_path, n_ctx=8192, n_batch=4096, n_threads=2) as model:
        yield model


async def no_threads_of_streams() -> None:
    """Wait until none is left; never, if one outlives its stream."""
    async with asyncio.timeout(60):
        while any(thread.name.startswith("overspill") for thread in threading.enumerate()):
            await asyncio.sleep(0.01)


async def prefilling() -> None:
    """Wait until a thread is at work, and a moment more, so that it is in the middle of a step."""
    async with asyncio.timeout(60):
        while not any(thread.name.startswith("overspill-stream") for thread in threading.enumerate()):
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)


def test_it_is_the_stream(tiny_gpt_oss: Model) -> None:
    """The tokens, the stop reason and the counts are those of ``stream``; no thread is left."""

    async def main() -> None:
        stream = tiny_gpt_oss.astream(PROMPT, temperature=0, max_tokens=24)
        assert "running" in repr(stream)
        assert [token async for token in stream] == greedy(tiny_gpt_oss).tokens
        assert stream.stats.stop_reason is StopReason.MAX_TOKENS
        assert (stream.stats.tokens, stream.stats.prompt_tokens) == (24, len(tiny_gpt_oss.tokenize(PROMPT)))
        assert [token async for token in stream] == []
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert "24 tokens" in repr(stream)
        await no_threads_of_streams()

    asyncio.run(main())


def test_the_loop_goes_on_while_the_stream_opens_and_steps(gemma: Model) -> None:
    """Both wait here for what only the event loop can give them."""

    async def main() -> None:
        asked, given = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()
        waits: list[str] = []

        def wait(where: str) -> None:
            loop.call_soon_threadsafe(asked.set)
            assert given.wait(60), "the event loop does not run"
            given.clear()
            waits.append(where)

        def stops() -> Iterator[str]:
            wait("opening")
            yield "\0"

        async def give() -> None:
            for _ in range(3):
                await asked.wait()
                asked.clear()
                given.set()

        def choose(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> None:
            wait("step")

        giver = asyncio.create_task(give())
        async with gemma.astream(PROMPT, max_tokens=2, stop=stops(), sampler=choose) as stream:  # type: ignore[arg-type]
            assert waits == ["opening"]
            assert len([token async for token in stream]) == 2
        assert waits == ["opening", "step", "step"]
        await giver

    asyncio.run(main())


def test_a_full_default_executor_does_not_stop_it(tiny_gpt_oss: Model) -> None:
    """Steps need none of its threads, which may be waiting for what we stream."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        done = threading.Event()
        blocked = loop.run_in_executor(None, done.wait, 60)
        tokens = [token async for token in tiny_gpt_oss.astream(PROMPT, temperature=0, max_tokens=24)]
        assert not blocked.done()
        done.set()
        assert await blocked
        assert tokens == greedy(tiny_gpt_oss).tokens

    asyncio.run(main())


@pytest.mark.slow
def test_two_interleave(gemma: Model) -> None:
    """Two tasks on one model get what each gets alone, and neither waits for the other's end."""
    prompts = ["The capital of France is", "def main():"]
    order: list[int] = []

    async def pull(number: int) -> list[overspill.Token]:
        tokens = []
        async for token in gemma.astream(prompts[number], temperature=0, max_tokens=24, logprobs=5):
            order.append(number)
            tokens.append(token)
        return tokens

    async def main() -> list[list[overspill.Token]]:
        return list(await asyncio.gather(pull(0), pull(1)))

    for prompt, together in zip(prompts, asyncio.run(main()), strict=True):
        # A batch rounds otherwise: where two tokens are about as likely, they may part.
        is_same(gemma.generate(prompt, temperature=0, max_tokens=24, logprobs=5).tokens, together)
    assert order.index(1) < 24
    assert order.index(0) < 24


def test_two_tasks_share_one(tiny_gpt_oss: Model) -> None:
    """Each token goes to one of them, and none is lost."""

    async def main() -> list[int]:
        stream = tiny_gpt_oss.astream(PROMPT, temperature=0, max_tokens=24)

        async def pull() -> list[int]:
            found = []
            while (token := await anext(stream, None)) is not None:
                found.append(token.id)
            return found

        first, second = await asyncio.gather(pull(), pull())
        return sorted(first + second)

    assert asyncio.run(main()) == sorted(token.id for token in greedy(tiny_gpt_oss).tokens)


async def by_cancelling(stream: AsyncStream[Token]) -> None:
    """End a stream by cancelling its task."""
    task = asyncio.create_task(anext(stream))
    await prefilling()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_a_timeout(stream: AsyncStream[Token]) -> None:
    """End a stream by a timeout."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            async for _ in stream:
                pass


async def by_aclose(stream: AsyncStream[Token]) -> None:
    """End a stream from another task, whose loop ends without an exception."""

    async def pull() -> list[overspill.Token]:
        return [token async for token in stream]

    task = asyncio.create_task(pull())
    await prefilling()
    await stream.aclose()
    assert await task == []


async def by_leaving_the_block(stream: AsyncStream[Token]) -> None:
    """End a stream with ``async with``, in which a task is cancelled."""

    async def pull() -> None:
        async with stream:
            await anext(stream)

    task = asyncio.create_task(pull())
    await prefilling()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("end", [by_cancelling, by_a_timeout, by_aclose, by_leaving_the_block])
def test_a_step_is_cancelled_in_its_middle(slow: Model, end: Callable[[AsyncStream[Token]], Awaitable[None]]) -> None:
    """The prompt is one step: one that went on to its end would have come to a token."""

    async def main() -> None:
        stream = slow.astream(LONG_PROMPT, temperature=0)
        await end(stream)
        await stream.aclose()
        assert stream.stats.stop_reason is StopReason.CLOSED
        assert (stream.stats.tokens, stream.stats.prompt_tokens) == (0, len(slow.tokenize(LONG_PROMPT)))
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        await no_threads_of_streams()

    asyncio.run(main())
    assert greedy(slow).text == greedy(slow).text != ""


@pytest.mark.parametrize("way", ["break", "raise", "generator", "with", "del", "aclose", "not begun"])
def test_an_abandoned_stream_ends_and_leaves_the_model_usable(tiny_gpt_oss: Model, way: str) -> None:
    """However the loop is left, the stream is closed, its thread goes, and the next one starts afresh."""

    async def texts(stream: AsyncStream[Token]) -> AsyncIterator[str]:
        async for token in stream:
            yield token.text

    async def main() -> None:
        stream = tiny_gpt_oss.astream(PROMPT)
        if way == "break":
            async for _ in stream:
                break
        elif way == "raise":
            with pytest.raises(ZeroDivisionError):
                async for _ in stream:
                    raise ZeroDivisionError
        elif way == "generator":
            generator = texts(stream)
            await anext(generator)
            await generator.aclose()  # type: ignore[attr-defined]
        elif way == "with":
            async with stream:
                await anext(stream)
        elif way == "aclose":
            await anext(stream)
            await stream.aclose()
            await stream.aclose()
        elif way == "not begun":
            await stream.aclose()
        if way == "del":
            await anext(stream)
            del stream
            gc.collect()
        else:
            assert [token async for token in stream] == []
            await stream.aclose()
            assert stream.stats.stop_reason is StopReason.CLOSED
            assert stream.stats.tokens == (0 if way == "not begun" else 1)
        await no_threads_of_streams()

    expected = greedy(tiny_gpt_oss).text
    asyncio.run(main())
    assert greedy(tiny_gpt_oss).text == expected


def test_exceptions_pass_unchanged(tiny_gpt_oss: Model) -> None:
    """A sampler's exception is the very object, and ends the stream; mistakes come out of the first step."""
    problem = LookupError("the sampler's own")

    def fail(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> None:
        raise problem

    async def main() -> None:
        stream = tiny_gpt_oss.astream(PROMPT, sampler=fail)
        with pytest.raises(LookupError) as caught:
            await anext(stream)
        assert caught.value is problem
        assert stream.stats.stop_reason is StopReason.ERROR
        with pytest.raises(ValueError, match="max_tokens must be at least 1"):
            await anext(tiny_gpt_oss.astream(PROMPT, max_tokens=0))
        with pytest.raises(TypeError, match="frobnicate"):
            async with tiny_gpt_oss.astream(PROMPT, frobnicate=1):  # type: ignore[call-arg]
                pass
        with pytest.raises(overspill.ContextFullError, match="the context holds 1024"):
            async for _ in tiny_gpt_oss.astream(LONG_PROMPT):
                pass
        await no_threads_of_streams()

    asyncio.run(main())


def test_a_closed_model(gemma_path: Path) -> None:
    """It ends its streams, and opens no more."""

    async def main() -> None:
        model = Model(gemma_path, n_ctx=256, n_threads=2)
        stream = model.astream(PROMPT)
        await anext(stream)
        model.close()
        assert [token async for token in stream] == []
        assert stream.stats.stop_reason is StopReason.CLOSED
        with pytest.raises(overspill.ClosedError):
            await anext(model.astream(PROMPT))

    asyncio.run(main())


def test_samplers_and_processors_in_python(tiny_gpt_oss: Model) -> None:
    """They choose as in ``stream``, in one thread that is not the loop's, with the caller's context variables."""
    user = contextvars.ContextVar[str]("user")
    seen: set[tuple[str, int]] = set()
    banned = [token.id for token in greedy(tiny_gpt_oss).tokens[:3]]

    def ban(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> None:
        logits[banned] = -np.inf

    def second(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> int:
        return int(np.argsort(logits)[-2])

    def look(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> None:
        seen.add((user.get("nobody"), threading.get_ident()))

    async def main() -> list[overspill.Token]:
        user.set("me")
        stream = tiny_gpt_oss.astream(PROMPT, sampler=second, logits_processors=[ban, look], max_tokens=8)
        user.set("somebody else")
        return [token async for token in stream]

    expected = tiny_gpt_oss.generate(PROMPT, sampler=second, logits_processors=[ban], max_tokens=8).tokens
    assert asyncio.run(main()) == expected
    ((name, thread),) = seen
    assert name == "me"
    assert thread != threading.get_ident()


@pytest.mark.slow
def test_a_program_ends_with_an_open_stream(gemma_path: Path) -> None:
    """Held by a name until the very end, between steps and in the middle of one."""
    program = f"""
import asyncio, overspill
model = overspill.Model({str(gemma_path)!r}, n_ctx=1024, n_threads=1)
async def main():
    global stream, task
    stream = model.astream("Once upon a time")
    await anext(stream)
    task = asyncio.ensure_future(anext(model.astream("word " * 900)))
    await asyncio.sleep(0.2)
loop = asyncio.new_event_loop()
loop.run_until_complete(main())
print("end")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr
    assert "Traceback" not in done.stderr


# Whole programs, each of which leaves streams behind in one way; `loop` and `model` are there.
ABANDONED = {
    "a constructor that is misused": """
try:
    overspill.AsyncStream()
except TypeError:
    pass
""",
    "not begun": "[model.astream('Hello') for _ in range(20)]",
    "not begun and closed": "loop.run_until_complete(model.astream('Hello').aclose())",
    "dropped between steps": """
for _ in range(20):
    loop.run_until_complete(anext(model.astream('Hello')))
""",
    "in a cycle of references": """
for _ in range(20):
    stream = model.astream('Hello')
    stream.itself = stream
    loop.run_until_complete(anext(stream))
stream = None
""",
    "a loop that is left": """
async def leave():
    async for _ in model.astream('Hello'):
        break
for _ in range(20):
    loop.run_until_complete(leave())
""",
    "the event loop closed before": """
stream = model.astream('Hello')
loop.run_until_complete(anext(stream))
loop.close()
stream = None
""",
    "the event loop closed during a step": """
stream = model.astream(LONG)
step = loop.create_task(anext(stream))
step._log_destroy_pending = False  # which the program's own task deserves
loop.run_until_complete(asyncio.sleep(0.05))
loop.close()
step = stream = None
""",
    "the event loop closed while a stream closes": """
stream = model.astream(LONG)
step = loop.create_task(anext(stream))
step._log_destroy_pending = False
async def close():
    closing = asyncio.create_task(stream.aclose())
    await asyncio.sleep(0)
    closing.cancel()
loop.run_until_complete(asyncio.sleep(0.05))
loop.run_until_complete(close())
loop.close()
step = stream = None
""",
    "a task that is cancelled": """
async def main():
    step = asyncio.create_task(anext(model.astream(LONG)))
    await asyncio.sleep(0.05)
    step.cancel()
    await asyncio.gather(step, return_exceptions=True)
loop.run_until_complete(main())
""",
    "a model that is closed": """
stream = model.astream('Hello')
loop.run_until_complete(anext(stream))
model.close()
stream = None
""",
    "another event loop": """
stream = model.astream('Hello')
loop.run_until_complete(anext(stream))
asyncio.run(stream.aclose())
""",
    "a generator that is left": """
async def texts():
    async for token in model.astream('Hello'):
        yield token.text
generator = texts()
loop.run_until_complete(anext(generator))
loop.run_until_complete(loop.shutdown_asyncgens())
generator = None
""",
}
AROUND = """
import asyncio, gc, os, sys, threading, time
import overspill
model = overspill.Model(sys.argv[1], n_ctx=8192, n_batch=256, n_threads=1)
LONG = [5] * 2000  # a step comes to its end where nobody is left to cancel it
model.generate("Hello", max_tokens=1)
loop = asyncio.new_event_loop()
loop.run_until_complete(asyncio.sleep(0))
n_threads, n_open = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
exec(sys.argv[2])
gc.collect()
deadline = time.monotonic() + 60
while len(os.listdir("/proc/self/task")) > n_threads:
    assert time.monotonic() < deadline, threading.enumerate()
    time.sleep(0.01)
    gc.collect()
loop.close()
assert len(os.listdir("/proc/self/fd")) <= n_open
if not model.closed:
    assert model.generate("Hello", max_tokens=1).tokens
print("end")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads and descriptors in /proc")
@pytest.mark.parametrize("way", sweep(ABANDONED, always=[7]))
def test_a_program_that_abandons_streams(tiny_gpt_oss_path: Path, way: str) -> None:
    """It says nothing, comes to its end, and no thread and no descriptor stays."""
    command = [sys.executable, "-c", AROUND, str(tiny_gpt_oss_path), ABANDONED[way]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
