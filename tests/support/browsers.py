"""A browser for pages, what its models must not get it to do, and a server that notices if they do."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

CHROMIUM = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM_ELSEWHERE = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
)


class Canary:
    """A server that takes note of who comes."""

    def __init__(self) -> None:
        """Listen on loopback."""
        self.paths: list[str] = []
        canary = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                canary.paths.append(self.path)
                self.send_error(404)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def canary() -> Iterator[Canary]:
    """Start one for a test."""
    server = Canary()
    yield server
    server.close()


def hostile(address: str) -> str:
    """Return what a model must not get a reader's browser to do."""
    return (
        f'<script>document.title = "taken"</script><script src="{address}/a.js"></script>\n\n'
        f'<img src="{address}/b.png" onerror="document.title = 1"> <iframe src="{address}/c"></iframe>\n\n'
        f'<link rel="stylesheet" href="{address}/d.css"><style>@import url("{address}/e.css");</style>\n\n'
        f'<meta http-equiv="refresh" content="0; url={address}/f"> <svg onload="document.title = 2"></svg>\n\n'
        f"![a picture]({address}/g.png) [wrong](javascript:document.title=3) [mail](mailto:a@example.org)\n\n"
        f"<https://example.org/> [data](data:text/html,x) [file](file:///etc/passwd) </div></article></main>\n"
    )


@pytest.fixture(scope="session")
def chromium() -> str:
    """Return a browser; skip where there is none."""
    found = [path for name in CHROMIUM if (path := shutil.which(name))]
    found += [path for path in CHROMIUM_ELSEWHERE if Path(path).is_file()]
    if not found:
        message = "no Chromium to open the page in: apt install chromium"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found[0]
