"""``overspill serve`` from outside: keys, limits, clients that go away, and its end."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from commands import overspill
from servers import Server, is_error, serving

CHAT = "/v1/chat/completions"
PATHS = (CHAT, "/v1/completions")


def asked(text: str = "Hello", **options: object) -> dict[str, object]:
    """Return a request."""
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 4, **options}


@pytest.fixture(scope="module")
def server(smollm2_path: Path) -> Iterator[Server]:
    """Serve SmolLM2 behind a key, with a limit of everything."""
    limits = ("--most-requests", 2, "--body", 1, "--timeout", 30)
    options = ("--ctx", 2048, "--parallel", 2, "--offload", "cpu", "--api-key", "one", "--api-key", "two")
    with serving(smollm2_path, *options, *limits, key="two") as started:
        yield started


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer three", "two", "Basic two", "Bearer one two"])
def test_a_wrong_key(server: Server, header: str) -> None:
    """Nothing but the health is told."""
    headers = {"Authorization": header}
    for path in ("/v1/models", "/metrics", "/overspill/plan", "/openapi.json"):
        response = httpx.get(server.url + path, headers=headers)
        assert response.status_code == 401
        assert is_error(response)
    assert httpx.get(f"{server.url}/health", headers=headers).json() == {"status": "ok"}


@pytest.mark.parametrize("key", ["one", "two"])
def test_each_key_is_good(server: Server, key: str) -> None:
    """The server has two."""
    assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_another_address_needs_a_key(smollm2_path: Path) -> None:
    """The command says what to do, and loads nothing."""
    done = overspill("serve", smollm2_path, "--host", "0.0.0.0")
    assert done.returncode == 2
    assert "--api-key" in done.stderr
    assert "--no-auth" in done.stderr


def test_a_model_that_is_none(tmp_path: Path) -> None:
    """A file that is missing or no model is told before the server listens."""
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    for name in ("missing.gguf", "no.gguf"):
        done = overspill("serve", tmp_path / name)
        assert done.returncode == 1
        assert name in done.stderr.splitlines()[-1]


def test_a_taken_port(server: Server, smollm2_path: Path) -> None:
    """The command says so in one line."""
    done = overspill("serve", smollm2_path, "--port", server.url.rpartition(":")[2])
    assert done.returncode == 1
    assert "give another --port" in done.stderr.splitlines()[-1]


def test_a_large_body(server: Server) -> None:
    """It is refused, whether its size is told or not."""
    large = json.dumps(asked("x" * (1 << 20))).encode()
    assert server.post(CHAT, large).status_code == 413
    headers = {"Authorization": f"Bearer {server.key}"}
    chunked = httpx.post(server.url + CHAT, content=iter([large[:700_000], large[700_000:]]), headers=headers)
    assert chunked.status_code == 413
    assert is_error(chunked)


def streamed(server: Server, lines: list[str], enough: Callable[[], bool] = lambda: False) -> None:
    """Stream a long reply, and leave it when there is enough."""
    headers = {"Authorization": f"Bearer {server.key}"}
    request = asked(stream=True, max_tokens=1900, logit_bias={"2": -100})
    with httpx.stream("POST", server.url + CHAT, json=request, headers=headers, timeout=60) as response:
        for line in response.iter_lines():
            lines.extend([line] if line else [])
            if enough():
                return


def test_too_many_requests(server: Server) -> None:
    """Two run; the third is told to come again. When their clients have gone, it is answered."""
    server.wait_until_free()
    leave = threading.Event()
    lines: list[list[str]] = [[], []]
    threads = [threading.Thread(target=streamed, args=(server, of_one, leave.is_set)) for of_one in lines]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while any(len(of_one) < 3 for of_one in lines):
        assert time.monotonic() < deadline
    response = server.post(CHAT, asked())
    leave.set()
    assert response.status_code == 429
    assert response.headers["Retry-After"] == "1"
    assert is_error(response)
    for thread in threads:
        thread.join(60)
    server.wait_until_free()
    assert server.post(CHAT, asked()).status_code == 200


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_goes_away_ends_its_stream(server: Server, is_streamed: bool) -> None:
    """Its place is free at once."""
    server.wait_until_free()
    headers = {"Authorization": f"Bearer {server.key}"}
    request = asked("Tell a story", max_tokens=480, stream=is_streamed, logit_bias={"2": -100})
    if is_streamed:
        lines: list[str] = []
        streamed(server, lines, lambda: len(lines) >= 5)
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + CHAT, json=request, headers=headers, timeout=httpx.Timeout(20, read=0.2))
    server.wait_until_free()
    assert server.post(CHAT, asked()).status_code == 200


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_other_methods_and_paths(server: Server, method: str) -> None:
    """They are errors in the same form."""
    headers = {"Authorization": f"Bearer {server.key}"}
    for path in (*PATHS, "/v1/nothing", "/v1/models/x/../y"):
        response = httpx.request(method, server.url + path, headers=headers)
        assert response.status_code in (404, 405)
        assert is_error(response)


def test_the_end(smollm2_path: Path) -> None:
    """SIGTERM in the middle of ten streams: each is told why it ends, and the process goes."""
    with serving(smollm2_path, "--ctx", 2048, "--parallel", 4, "--offload", "cpu") as server:
        lines: list[list[str]] = [[] for _ in range(10)]
        threads = [threading.Thread(target=streamed, args=(server, of_one)) for of_one in lines]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 20
        # Four have places, and the others wait.
        while server.n_active() < len(lines) or not any(len(of_one) > 10 for of_one in lines):
            assert time.monotonic() < deadline
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(20)
        server.process.wait(20)
        for of_one in lines:
            assert of_one[-1] == "data: [DONE]"
            assert "shutting down" in of_one[-2] or "finish_reason" in of_one[-2]


def test_models_that_do_not_fit_together(smollm2_path: Path, tiny_gpt_oss_path: Path) -> None:
    """The one that was used least recently is closed, and loaded again when it is asked for."""
    options = ("--ctx", 512, "--offload", "cpu", "--memory", "cpu=180MiB")
    with serving(smollm2_path, tiny_gpt_oss_path, *options) as server:

        def loaded() -> list[str]:
            names = [smollm2_path.stem, tiny_gpt_oss_path.stem]
            plans = {name: httpx.get(f"{server.url}/overspill/plan", params={"model": name}).json() for name in names}
            assert all("forecast" in plan or plan["loaded"] for plan in plans.values())
            return [name for name, plan in plans.items() if plan["loaded"]]

        assert loaded() == []
        for path in (smollm2_path, tiny_gpt_oss_path, smollm2_path):
            response = server.post("/v1/completions", {"model": path.stem, "prompt": "Hello", "max_tokens": 2})
            assert response.status_code == 200, response.text
            assert path.stem in loaded()


def test_first_requests_share_a_load(smollm2_path: Path) -> None:
    """A client that goes away meanwhile does not end it for the others."""
    with serving(smollm2_path, "--ctx", 512, "--offload", "cpu", "--load-mode", "read") as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + CHAT, json=asked(), timeout=httpx.Timeout(20, read=0.01))
        with ThreadPoolExecutor(4) as pool:
            responses = list(pool.map(lambda i: server.post(CHAT, asked(f"Say {i}")), range(4)))
        assert [response.status_code for response in responses] == [200] * 4
        server.process.terminate()
        assert server.process.stderr is not None
        assert server.process.stderr.read().count(f"loading {smollm2_path.stem}") == 1
