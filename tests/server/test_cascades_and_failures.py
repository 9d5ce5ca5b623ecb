"""Cascades on a server, what a server says before it listens, and a model that fails under it."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from model_fixtures import with_template
from overspill import ChatStream, Model, ModelInfo, mean_logprob
from overspill.server.answers import CascadeAnswer
from overspill.server.app import Limits, make_app
from overspill.server.models import Models
from programs import WITHOUT_GPU, python_environment
from servers import Server, free_port, serving

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def random(tiny_gpt_oss_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model that does not know what it says: its weights are random."""
    return with_template(tiny_gpt_oss_path, tmp_path_factory.mktemp("models") / "random.gguf", "llama-cpp-rwkv-world")


@pytest.fixture(scope="module")
def names(smollm2_path: Path, random: Path) -> tuple[str, str]:
    """Return the name of a model that knows, and of that one."""
    return smollm2_path.stem, random.stem


@pytest.fixture(scope="module")
def server(smollm2_path: Path, random: Path) -> Iterator[Server]:
    """Serve both, and a cascade that is listed."""
    pair = f"cascade:{smollm2_path},{random}"
    with serving(random, pair, "--ctx", 512, "--offload", "cpu") as started:
        yield started


def asked(model: str, **options: Any) -> dict[str, Any]:
    """Return a request."""
    question = {"role": "user", "content": "Count from 1 to 10."}
    return {"model": model, "messages": [question], "max_tokens": 8, "temperature": 0, **options}


def test_a_cascade_is_listed(server: Server, names: tuple[str, str]) -> None:
    """It is named by the names of its models, and its plan is that of both."""
    known, other = names
    models = [model.id for model in server.client().models.list().data]
    assert models == [other, known, f"cascade:{known},{other}"]
    assert server.client().models.retrieve(models[2]).id == models[2]
    plan = httpx.get(f"{server.url}/overspill/plan", params={"model": models[2]}).json()
    assert {which: of["model"] for which, of in plan["cascade"].items()} == {"small": known, "large": other}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_cascade_answers_by_its_signal(
    server: Server, names: tuple[str, str], smollm2_path: Path, random: Path, order: tuple[int, int], streamed: bool
) -> None:  # fmt: skip
    """A draft that is probable enough is the answer; otherwise it is the large model's, and the reason says so."""
    small, large = (names[i] for i in order)
    paths = smollm2_path, random
    request = asked(f"cascade:{small},{large}")
    with Model(paths[order[0]], n_ctx=512, offload="cpu") as model:
        reply = model.chat(request["messages"], max_tokens=8, temperature=0, logprobs=True)
        logprobs = [token.logprob for token in reply if token.logprob is not None and token.text]
        is_enough = sum(logprobs) / len(logprobs) > mean_logprob().bound
        text = reply.text
    if not is_enough:
        with Model(paths[order[1]], n_ctx=512, offload="cpu") as model:
            text = model.ask(request["messages"], max_tokens=8, temperature=0).text
    assert is_enough == (order == (0, 1))
    if streamed:
        with httpx.stream("POST", server.url + CHAT, json={**request, "stream": True}, timeout=60) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        chunks = [json.loads(line) for line in lines[:-1]]
        answer = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        end = chunks[-1]["choices"][0]
    else:
        end = server.post(CHAT, request).json()["choices"][0]
        answer = end["message"]["content"]
    assert answer == text
    assert end["overspill"]["answered_by"] == (small if is_enough else large)
    assert "mean log-probability" in end["overspill"]["reason"]
    assert end["logprobs"] is None  # nobody asked for those that judge the small model
    assert end["overspill"]["tokens_per_s"] > 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
def test_a_cascade_answers_every_kind_of_request(server: Server, names: tuple[str, str], path: str) -> None:
    """Continuations and the Responses API have the same names."""
    text = {"prompt": "The capital of France is", "max_tokens": 4}
    of_path = {"/v1/completions": text, "/v1/responses": {"input": "Hello", "max_output_tokens": 4}}
    response = server.post(path, {"model": "cascade:" + ",".join(names), **of_path[path]})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("changed", "status", "part"),
    [
        ({"model": "cascade:{0}"}, 404, "SMALL,LARGE"),
        ({"model": "cascade:{0},nothing"}, 404, "nothing"),
        ({"model": "cascade:,"}, 404, "SMALL,LARGE"),
        ({"model": "cascade:{0},{1}", "n": 2}, 400, "n:"),
        ({"model": "cascade:{0},{1}", "logit_bias": {"99999999": 1}}, 400, "logit_bias"),
    ],
)
def test_mistakes(server: Server, names: tuple[str, str], changed: dict[str, Any], status: int, part: str) -> None:
    """Each is told in OpenAI's form."""
    request = asked(**{"model": "", **changed, **{"model": changed["model"].format(*names)}})
    response = server.post(CHAT, request)
    assert response.status_code == status
    assert part in response.json()["error"]["message"]


def test_token_ids_are_for_one_model(server: Server, names: tuple[str, str]) -> None:
    """A cascade has two, which may number their tokens differently."""
    response = server.post("/v1/completions", {"model": "cascade:" + ",".join(names), "prompt": [1, 2, 3]})
    assert response.status_code == 400
    assert "prompt" in response.json()["error"]["message"]


def test_a_cascade_that_is_left_takes_no_model(smollm2_path: Path, random: Path) -> None:
    """Where its client goes away while the small model is judged, the large one is not in use afterwards."""
    files = {"small": smollm2_path, "large": random}
    models = Models(files, [], ModelInfo.from_file, {"n_ctx": 128, "offload": "cpu"})

    async def leave() -> None:
        using = AsyncExitStack()
        small = await using.enter_async_context(models.using("small"))

        def start(model: Model, options: Any) -> ChatStream:
            return model.chat("Hello", **options)

        answer = CascadeAnswer(models, {"small": "small", "large": "large"}, using, small, start, {"max_tokens": 2})
        async with answer:
            pass
        await using.aclose()
        with pytest.raises(asyncio.CancelledError):
            assert answer._cascade is not None
            await asyncio.to_thread(answer._lend, "large", answer._cascade)
        assert [one.n_users for one in models.served.values()] == [0, 0]
        await models.close()

    asyncio.run(leave())


def test_a_model_that_waits_for_memory_gets_it(smollm2_path: Path, random: Path) -> None:
    """Requests for the loaded one, which come before the last has ended, do not keep the other out for ever."""
    with serving(smollm2_path, random, "--ctx", 512, "--offload", "cpu", "--memory", "cpu=130MiB") as server:
        enough = threading.Event()

        def ask_again_and_again() -> None:
            while not enough.is_set():
                assert server.post(CHAT, asked(smollm2_path.stem)).status_code == 200

        with ThreadPoolExecutor(3) as pool:
            busy = [pool.submit(ask_again_and_again) for _ in range(3)]
            try:
                response = server.post(CHAT, asked(random.stem))
            finally:
                enough.set()
            assert response.status_code == 200, response.text
            for one in busy:
                one.result()


def test_a_client_that_does_not_read_is_left(random: Path) -> None:
    """Its time is limited too: after that, its place and its model are free."""
    with serving(random, "--ctx", 8192, "--offload", "cpu", "--timeout", 6) as server:
        body = {
            "prompt": [1, 2, 3],
            "max_tokens": 8000,
            "logprobs": 5,
            "stream": True,
            "n": 16,
            "logit_bias": {"2": -100},
        }
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
            deadline = time.monotonic() + 20
            while not server.n_active():
                assert time.monotonic() < deadline
            server.wait_until_free()


def test_a_large_model_takes_the_small_ones_place(smollm2_path: Path, random: Path) -> None:
    """Where memory does not hold both, the small one is closed first, and loaded again for the next question."""
    pair = f"cascade:{random},{smollm2_path}"
    with serving(pair, "--ctx", 512, "--offload", "cpu", "--memory", "cpu=130MiB") as server:
        for _ in range(2):
            response = server.post(CHAT, asked(f"cascade:{random.stem},{smollm2_path.stem}"))
            assert response.status_code == 200, response.text
            assert response.json()["choices"][0]["overspill"]["answered_by"] == smollm2_path.stem
        server.process.terminate()
        assert server.process.stderr is not None
        told = server.process.stderr.read()
    assert told.count(f"loading {random.stem}") == told.count(f"loading {smollm2_path.stem}") == 2


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--experts", "nonsense"], "--experts"),
        (["--type-k", "q9"], "--type-k"),
        (["--memory", "banana=1GiB"], "banana"),
        (["--ctx", "-1"], "--ctx"),
        (["--rpc", "127.0.0.1:1"], "127.0.0.1:1"),
        (["cascade:x"], "SMALL,LARGE"),
        (["nothing.gguf"], "nothing.gguf"),
    ],
)
def test_a_server_that_would_answer_nothing_does_not_listen(
    smollm2_path: Path, arguments: list[str], part: str
) -> None:
    """Wrong options are told at the start, in one line that names them."""
    command = [sys.executable, "-m", "overspill", "serve", str(smollm2_path), *arguments, "--port", str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert part in done.stderr
    assert "serving" not in done.stderr


FAILURE = """
import asyncio, ctypes, os, sys
from pathlib import Path
import httpx
from overspill import ModelInfo
from overspill.server.app import Limits, make_app
from overspill.server.models import Models

library, path, streamed = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "True"
places = ctypes.CDLL(library)
told = []
models = Models({"model": path}, [], ModelInfo.from_file, {"n_ctx": 128, "n_threads": 1, "offload": "cpu"}, told.append)


async def main():
    app = make_app(models, limits=Limits(), closing=asyncio.Event())
    transport = httpx.ASGITransport(app)
    request = {"prompt": [1, 2, 3], "max_tokens": 20, "temperature": 0, "stream": streamed}
    async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=60) as client:
        async def ask():
            response = await client.post("/v1/completions", json=request)
            return response.status_code, response.text

        status, _ = await ask()
        assert status == 200
        first = models.served["model"].model
        places.fail_after(0, ctypes.c_int64(40))
        status, text = await ask()
        assert "cannot be used any more" in text, text
        assert status == (200 if streamed else 503)
        status, text = await ask()
        assert status == 200 and "cannot be used" not in text, text
        assert models.served["model"].model is not first and first.closed
        assert sum("loads again" in line for line in told) == 1, told
    await models.close()


asyncio.run(main())
print("answered again")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="functions are replaced by LD_PRELOAD")
@pytest.mark.parametrize("streamed", [False, True])
def test_a_model_that_failed_is_loaded_again(tiny_gpt_oss_path: Path, upstream_tools: Path, streamed: bool) -> None:
    """The request in which llama.cpp failed gets an error; the next one gets an answer."""
    (library,) = upstream_tools.glob("*failing_assertions.*")
    command = [sys.executable, "-c", FAILURE, str(library), str(tiny_gpt_oss_path), str(streamed)]
    environment = python_environment(LD_PRELOAD=str(library), **WITHOUT_GPU)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert "answered again" in done.stdout, done.stderr[-3000:]


def test_a_fault_of_the_server_has_openais_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that nobody has thought of is an error like others, and counted."""
    models = Models({}, [], ModelInfo.from_file, {})

    async def fail(_: str) -> dict[str, Any]:
        raise KeyError("unforeseen")

    monkeypatch.setattr(models, "plan", fail)

    async def ask() -> tuple[httpx.Response, str]:
        app = make_app(models, limits=Limits(), closing=asyncio.Event())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.get("/overspill/plan"), (await client.get("/metrics")).text

    response, metrics = asyncio.run(ask())
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "unforeseen" in response.json()["error"]["message"]
    assert 'overspill_requests_total{path="/overspill/plan",status="500"} 1.0' in metrics
