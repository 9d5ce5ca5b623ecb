"""A real server in a process of its own, as ``overspill serve`` starts it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import openai


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    url: str
    process: subprocess.Popen[str]
    key: str

    @property
    def api(self) -> str:
        """Return the address that OpenAI's clients take."""
        return f"{self.url}/v1"

    def client(self) -> openai.OpenAI:
        """Return OpenAI's client of it, which tries everything once."""
        return openai.OpenAI(base_url=self.api, api_key=self.key, max_retries=0, timeout=60)

    def post(self, path: str, content: object, **headers: str) -> httpx.Response:
        """Send JSON, or bytes as they are."""
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json", **headers}
        if isinstance(content, bytes):
            return httpx.post(self.url + path, content=content, headers=headers, timeout=60)
        return httpx.post(self.url + path, json=content, headers=headers, timeout=60)

    def n_active(self) -> int:
        """Return the requests for texts that run or wait, as its metrics tell."""
        text = httpx.get(f"{self.url}/metrics", headers={"Authorization": f"Bearer {self.key}"}).text
        (line,) = (line for line in text.splitlines() if line.startswith("overspill_active_requests "))
        return int(float(line.split()[1]))

    def wait_until_free(self) -> None:
        """Wait until no request runs."""
        deadline = time.monotonic() + 20
        while self.n_active():
            assert time.monotonic() < deadline, "a stream goes on without its client"
            time.sleep(0.02)


class HasJson(Protocol):
    """An answer of whichever client."""

    def json(self) -> Any:
        """Return its content."""


def is_error(response: HasJson) -> bool:
    """Return whether an answer has OpenAI's form of errors."""
    error = response.json()["error"]
    return set(error) == {"message", "type", "param", "code"} and bool(error["message"])


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def listening(command: Sequence[str | Path], url: str) -> Iterator[subprocess.Popen[str]]:
    """Start a server, wait until it says that it is healthy, and end it after the block."""
    environment = {name: value for name, value in os.environ.items() if name != "OVERSPILL_API_KEY"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        deadline = time.monotonic() + 60
        while not _is_healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise AssertionError(f"no server: {process.communicate()[1]}")
            time.sleep(0.05)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stderr is not None:
            process.stderr.close()


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.TransportError:
        return False


@contextmanager
def serving(*arguments: object, key: str = "") -> Iterator[Server]:
    """Start ``overspill serve`` with more arguments, wait until it listens, and end it after the block."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "overspill", "serve", *map(str, arguments), "--port", str(port)]
    with listening(command, url) as process:
        yield Server(url, process, key or "no key")
