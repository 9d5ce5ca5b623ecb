"""Who may ask: keys are tested where a server runs, and here the names of servers and of pages."""

from __future__ import annotations

import json

import pytest

from overspill.server.access import is_loopback, refusing

HOST = "127.0.0.1:8080"


def status(
    host: str = HOST,
    origin: str | None = None,
    *,
    origins: tuple[str, ...] = (),
    is_local: bool = True,
) -> int:
    """Return the status of the refusal of a request, or 200."""
    headers = [(b"host", host.encode("latin-1"))] if host else []
    headers += [(b"origin", origin.encode("latin-1"))] if origin is not None else []
    answer = refusing([], origins, is_local=is_local)({"type": "http", "path": "/", "headers": headers})
    if answer is None:
        return 200
    assert "--origin" in json.loads(bytes(answer.body))["error"]["message"]
    return answer.status_code


@pytest.mark.parametrize("host", [HOST, "localhost:8080", "LOCALHOST", "127.8.0.1", "[::1]:8080", "a.localhost", ""])
def test_local_names(host: str) -> None:
    """They are this machine's, whatever the port; programs that give no name are no browsers."""
    assert status(host) == 200


@pytest.mark.parametrize(
    "host",
    ["example.org", "localhost.example.org:8080", "192.168.0.1", "[::2]", "[", "a@example.org", "x" * 999],
)
def test_other_names(host: str) -> None:
    """A page whose name leads to this machine is refused; a server that others reach has many names."""
    assert status(host) == 403
    assert status(host, is_local=False) == 200


def test_a_name_that_was_given() -> None:
    """A proxy's, for one."""
    origins = ("https://models.example.org",)
    assert status("models.example.org", origins=origins) == 200
    assert status("models.example.org", "https://models.example.org", origins=origins) == 200
    assert status("example.org", origins=origins) == 403
    assert status("example.org", "https://example.org", origins=("*",)) == 200


@pytest.mark.parametrize("origin", [f"http://{HOST}", f"https://{HOST}", None])
def test_its_own_page(origin: str | None) -> None:
    """Programs name no origin."""
    assert status(origin=origin) == 200


@pytest.mark.parametrize("origin", ["https://example.org", "null", "http://127.0.0.1:8081", "http://localhost", ""])
@pytest.mark.parametrize("is_local", [True, False])
def test_pages_elsewhere(origin: str, is_local: bool) -> None:
    """Each is refused, also where a browser asks nobody before it sends the request; unless it is given."""
    assert status(origin=origin, is_local=is_local) == 403
    if origin:
        assert status(origin=origin, origins=(origin,)) == 200


def test_loopback() -> None:
    """Names are not looked up."""
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.1.2.3", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "example.org", "", "192.168.0.1")))
