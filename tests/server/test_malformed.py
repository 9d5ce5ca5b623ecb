"""Requests that are wrong, by chance or by the server's own description: each has its answer, and the server lives."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks

from model_fixtures import with_template
from servers import Server, is_error, serving

CHAT, RESPONSES, TEXT = "/v1/chat/completions", "/v1/responses", "/v1/completions"
FIELDS = (
    "model messages input prompt instructions stream n stop temperature top_p top_k seed max_tokens max_output_tokens "
    "logit_bias tools tool_choice parallel_tool_calls response_format text logprobs top_logprobs stream_options "
    "reasoning_effort reasoning echo suffix frequency_penalty"
)
VALUES: list[object] = [None, True, -1, 0, 1e308, 10**400, "x", "\ud800", "", [], {}, [[]], [None], {"a": {}}]


@pytest.fixture(scope="module")
def server(tiny_gpt_oss_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve a model that is fast and knows tools, with replies of 128 tokens at most."""
    model = tmp_path_factory.mktemp("models") / "tiny.gguf"
    with_template(tiny_gpt_oss_path, model, "Qwen-Qwen2.5-7B-Instruct")
    with serving(model, "--ctx", 128, "--parallel", 4, "--offload", "cpu") as started:
        yield started


def malformed(seed: int) -> tuple[str, bytes]:
    """Return a request that is damaged in some way, and its path."""
    chance = random.Random(seed)
    path = chance.choice((CHAT, RESPONSES, TEXT))
    said = [{"role": "user", "content": "Hello"}]
    request: dict[str, object] = {"max_tokens": 4, "max_output_tokens": 16}
    asked: dict[str, dict[str, object]] = {
        CHAT: {"messages": said},
        RESPONSES: {"input": said},
        TEXT: {"prompt": "Hello"},
    }
    request |= asked[path]
    for _ in range(chance.randint(1, 4)):
        request[chance.choice(FIELDS.split())] = chance.choice(VALUES)
    if chance.random() < 0.3:
        key = "input" if path == RESPONSES else "messages"
        request[key] = [{"role": chance.choice(["user", "tool", "x", None]), "content": chance.choice(VALUES)}]
    data = bytearray(json.dumps(request).encode())
    kind = chance.random()
    if kind < 0.2:
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(len(data))] = chance.randrange(256)
    elif kind < 0.3:
        data = data[: chance.randrange(len(data))]
    elif kind < 0.4:
        data = bytearray(chance.randbytes(chance.randrange(100)))
    elif kind < 0.45:
        data = bytearray(b"[" * 100_000)
    return path, bytes(data)


def check_malformed(server: Server, seeds: range) -> int:
    """Send damaged requests from four threads, and return how many; none is answered with an error of the server."""

    def send(seed: int) -> None:
        path, data = malformed(seed)
        response = client.post(path, content=data, headers={"Content-Type": "application/json"})
        assert response.status_code < 500, (seed, data[:300], response.text)
        assert response.status_code == 200 or is_error(response), seed

    with httpx.Client(base_url=server.url, timeout=60) as client, ThreadPoolExecutor(4) as pool:
        return len([*pool.map(send, seeds)])


def check_description(server: Server, n_examples: int) -> int:
    """Send requests made of the description, good and bad ones, and return how many; answers are as it says."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    as_described = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    n_sent = 0
    with requests.Session() as session:
        for found in schema.get_all_operations():
            assert isinstance(found, Ok), found
            operation = found.ok()
            takes_fields = bool(operation.body or operation.query)

            def send(case: schemathesis.Case[Any]) -> None:
                nonlocal n_sent
                n_sent += 1
                response = case.call(session=session, timeout=60)
                assert response.status_code == 200 or is_error(response)
                case.validate_response(response, checks=as_described)

            for mode in [GenerationMode.POSITIVE, GenerationMode.NEGATIVE][: 1 + takes_fields]:
                cases = operation.as_strategy(generation_mode=mode)
                how = settings(
                    max_examples=n_examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
                )  # fmt: skip
                how(given(cases)(send))()
    return n_sent


def check_alive(server: Server) -> None:
    """Ask for something good; it is answered, and nothing else runs."""
    assert server.process.poll() is None
    answer = server.post(CHAT, {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4})
    assert answer.json()["usage"]["completion_tokens"] == 4
    server.wait_until_free()


def test_malformed_requests(server: Server) -> None:
    """Hundreds here; ten thousand in the slow test."""
    check_malformed(server, range(300))
    assert check_description(server, 5) > 30
    check_alive(server)


def test_bytes_that_are_no_request(server: Server) -> None:
    """They end their own connection alone."""
    chance = random.Random(1)
    port = int(server.url.rpartition(":")[2])
    for begin in (b"", b"GET ", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 9\r\n\r\n", b"\x16\x03\x01"):
        for _ in range(25):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
                connection.sendall(begin + chance.randbytes(200) + b"\r\n\r\n")
                answer = connection.recv(1 << 16)
                assert not answer or answer.startswith(b"HTTP/1.1 4"), answer
    check_alive(server)


@pytest.mark.slow
def test_ten_thousand_malformed_requests(server: Server) -> None:
    """As the quick test."""
    n_described = check_description(server, 200)
    assert n_described > 1500
    assert n_described + check_malformed(server, range(300, 10_300 - n_described)) >= 10_000
    check_alive(server)
