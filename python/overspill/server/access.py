"""Who may ask: those that have a key, and of the pages in a browser this server's own and those of given origins."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

from overspill.server.errors import ApiError

__all__ = ["is_loopback", "refusing"]

_OPEN_PATHS = {"/", "/health"}  # the page asks for the key


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine to itself alone, by its address or by the name localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def refusing(api_keys: Sequence[str], origins: Sequence[str], *, is_local: bool) -> Callable[[Scope], Response | None]:
    """Return a function that returns the answer to requests which are refused, and None for others.

    Parameters
    ----------
    api_keys
        One of them has to be in a request's ``Authorization: Bearer``. None: everybody is answered.
    origins
        Origins whose pages may ask beside this server's own; ``"*"``: all.
    is_local
        Whether the server listens at loopback alone. A page elsewhere may give its own name the address of this
        machine, and would pass for this server's: so a local one answers to local names alone, and those of origins.
    """
    keys = [key.encode() for key in api_keys]
    names = {urlsplit(origin).hostname for origin in origins}

    def refusal(scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        name = _name(host)
        if "*" not in origins:
            if is_local and name and not (is_loopback(name) or name in names):
                return _refused(f"this server is not called {name!r:.100}: start it with --origin http://{name:.100}")
            if origin is not None and origin not in (*origins, f"http://{host}", f"https://{host}"):
                return _refused(f"pages of {origin!r:.100} may not ask: start the server with --origin {origin:.100}")
        if not keys or scope["path"] in _OPEN_PATHS or _has_one(keys, headers):
            return None
        return ApiError(401, "the API key is missing or wrong", code="invalid_api_key").response

    return refusal


def _name(host: str) -> str:
    """Return the name in a header ``Host``, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return host


def _has_one(keys: Sequence[bytes], headers: Headers) -> bool:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    # All of them, so that the time tells nothing.
    matches = [hmac.compare_digest(given.strip().encode(), key) for key in keys]
    return scheme.lower() == "bearer" and any(matches)


def _refused(message: str) -> Response:
    return ApiError(403, message, code="origin_not_allowed").response
