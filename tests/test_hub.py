"""Models from the Hugging Face hub, played by a server on this machine that speaks its protocol."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote

import pytest

from commands import overspill
from overspill.hub import demo_model, resolve
from sweeps import sweep

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """One repository, ``owner/models``, and a gated one."""

    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]] = {}
    requests: ClassVar[list[tuple[str, str, str | None]]] = []
    # Sends only so many bytes of the next file, then hangs up.
    cut_after: ClassVar[int | None] = None

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""

    def do_HEAD(self) -> None:
        """Answer as GET does, without the content."""
        self.answer(with_content=False)

    def do_GET(self) -> None:
        """Answer for a file, or for the list of files."""
        self.answer(with_content=True)

    def answer(self, with_content: bool) -> None:
        """Send headers as the hub does, and the content or the asked-for range of it."""
        path = unquote(self.path).split("?")[0]
        Hub.requests.append((self.command, path, self.headers.get("Range")))
        if path.startswith("/owner/gated/"):
            self.send_nothing(403, "GatedRepo")
            return
        if path.startswith("/api/models/owner/models"):
            siblings = [{"rfilename": name} for name in Hub.files]
            tree = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in Hub.files.items()]
            listing = tree if "/tree/" in path else {"id": "owner/models", "sha": COMMIT, "siblings": siblings}
            self.send_content(json.dumps(listing).encode(), {"Content-Type": "application/json"}, with_content)
            return
        prefix = "/owner/models/resolve/"
        if not path.startswith(prefix):
            self.send_nothing(404, "RepoNotFound")
            return
        revision, _, name = path.removeprefix(prefix).partition("/")
        if revision not in ("main", "v2", COMMIT):
            self.send_nothing(404, "RevisionNotFound")
        elif name not in Hub.files:
            self.send_nothing(404, "EntryNotFound")
        else:
            data = Hub.files[name]
            headers = {
                "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            self.send_content(data, headers, with_content)

    def send_nothing(self, status: int, code: str) -> None:
        """Send an error as the hub names them."""
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_content(self, data: bytes, headers: dict[str, str], with_content: bool) -> None:
        """Send ``data``, or what a Range header asks of it."""
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if not with_content:
            return
        if Hub.cut_after is not None and len(data) > Hub.cut_after:
            self.wfile.write(data[start : start + Hub.cut_after])
            self.close_connection = True
            Hub.cut_after = None
        else:
            self.wfile.write(data[start:])


@pytest.fixture
def hub(tiny_gpt_oss_path: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Serve the tiny model; return the environment in which the command finds the server and an empty cache."""
    data = tiny_gpt_oss_path.read_bytes()
    Hub.files = {"tiny.gguf": data, "sub/other.gguf": data[:1000], "README.md": b"hello"}
    Hub.requests = []
    Hub.cut_after = None
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    yield environment
    server.shutdown()
    server.server_close()
    thread.join()


def content_requests() -> list[tuple[str, str | None]]:
    """Return the downloads of content: path and range."""
    return [(path, asked) for method, path, asked in Hub.requests if method == "GET" and "/resolve/" in path]


def test_download_stream_and_cache(hub: dict[str, str], tiny_gpt_oss_path: Path) -> None:
    """The first run downloads, the second does not, and both run the model."""
    for _ in range(2):
        done = overspill("run", "hf:owner/models/tiny.gguf", "Hello", "-n", "4", environment=hub)
        assert done.returncode == 0, done.stderr
        assert "4 tokens" in done.stderr
        assert len(content_requests()) == 1
    (file,) = Path(hub["HF_HOME"]).rglob("snapshots/*/tiny.gguf")
    assert file.read_bytes() == tiny_gpt_oss_path.read_bytes()


@pytest.mark.slow
def test_an_interrupted_download_is_resumed(hub: dict[str, str], smollm2_path: Path) -> None:
    """After the server hangs up in the middle, only the rest is asked for, and the file is whole."""
    # Large, since the hub's library keeps what has come in pieces of 10 MB.
    data = smollm2_path.read_bytes()
    Hub.files = {"model.gguf": data}
    Hub.cut_after = 50_000_000
    for _ in range(2):  # whether it tries again by itself is the library's affair
        done = overspill("info", "hf:owner/models/model.gguf", "--json", environment=hub)
        if done.returncode == 0:
            break
        assert "try again" in done.stderr
    assert json.loads(done.stdout)["file_bytes"] == len(data)
    (_, first), (_, second) = content_requests()
    assert first is None
    assert second is not None
    assert 10_000_000 < int(second.removeprefix("bytes=").split("-")[0]) <= 50_000_000
    (file,) = Path(hub["HF_HOME"]).rglob("snapshots/*/model.gguf")
    assert file.read_bytes() == data


def test_revision_and_folder(hub: dict[str, str]) -> None:
    """A tag is asked for by its name, and a file may be in a folder."""
    done = overspill("info", "hf:owner/models/tiny.gguf@v2", "--json", environment=hub)
    assert done.returncode == 0, done.stderr
    done = overspill("info", "hf:owner/models/sub/other.gguf", environment=hub)
    assert done.returncode == 1
    assert "truncated" in done.stderr
    asked = [path for _, path, _ in Hub.requests]
    assert "/owner/models/resolve/v2/tiny.gguf" in asked
    assert "/owner/models/resolve/main/sub/other.gguf" in asked


def test_all_parts_of_a_split_model_are_brought(hub: dict[str, str], tmp_path: Path) -> None:
    """Naming the first file is enough."""
    from model_files import write_tiny_gpt_oss

    write_tiny_gpt_oss(tmp_path / "split.gguf", n_files=2)
    Hub.files = {file.name: file.read_bytes() for file in tmp_path.glob("split-*")}
    done = overspill("run", "hf:owner/models/split-00001-of-00002.gguf", "Hello", "-n", "2", environment=hub)
    assert done.returncode == 0, done.stderr
    assert len(content_requests()) == 2


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("hf:owner/none/a.gguf", "does not exist, or is private"),
        ("hf:owner/gated/a.gguf", "is gated: accept its terms"),
        ("hf:owner/models/a.gguf", "has no file a.gguf; it has sub/other.gguf, tiny.gguf"),
        ("hf:owner/models/tiny.gguf@v9", "has no revision v9"),
    ],
)
def test_what_is_not_there(hub: dict[str, str], model: str, text: str) -> None:
    """One line says what to do."""
    done = overspill("info", model, environment=hub)
    assert done.returncode == 1
    assert text in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""


def test_a_path_is_no_name(tmp_path: Path) -> None:
    """A path object is a file, whatever it is called, and a text that is none of the hub's names is one too."""
    for path in (tmp_path / "model.gguf", Path("hf:a/b/c.gguf")):
        assert resolve(path) == path
    assert resolve("folder/model.gguf") == Path("folder/model.gguf")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has one folder for local data")
@pytest.mark.parametrize(("platform", "folder"), sweep([("linux", ".cache"), ("darwin", "Library/Caches")], always=[0]))
def test_the_demo_model_is_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str, folder: str
) -> None:
    """Which is where the system has it, unless the environment says otherwise."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert demo_model().parent == tmp_path / folder / "overspill"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert demo_model().parent == tmp_path / "elsewhere" / "overspill"


@pytest.mark.parametrize("model", ["hf:", "hf:a/b", "hf:a/b/c.bin", "hf:a/b.gguf"])
def test_bad_names(model: str) -> None:
    """What is not of the form is a wrong command line, and nothing is asked of any server."""
    done = overspill("info", model)
    assert done.returncode == 2
    assert "hf:OWNER/REPOSITORY/FILE.gguf" in done.stderr


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    """Offline, and not in the cache: said in one line."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = overspill("info", "hf:owner/models/tiny.gguf", environment=environment)
    assert done.returncode == 1
    assert "cannot be reached, and tiny.gguf is not in the cache" in done.stderr
    assert done.stderr.count("\n") == 1
