"""The page at ``/``, and what it asks for beside OpenAI's API."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, Field
from starlette.responses import Response

from overspill.machine.devices import devices
from overspill.studies.compare.markdown import render_markdown

__all__ = ["add_page"]

_MOST_CHARACTERS = 1_000_000


class _Text(BaseModel):
    text: Annotated[str, Field(max_length=_MOST_CHARACTERS)]


def add_page(app: FastAPI) -> None:
    """Add the page to an application, the memory of devices, and the Markdown of answers as HTML."""
    page = files("overspill.server").joinpath("page.html").read_text(encoding="utf-8")
    headers = {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": _policy(page),
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    @app.get("/", include_in_schema=False)
    async def show() -> Response:
        return Response(page, media_type="text/html", headers=headers)

    # Without async: both compute, and run in a thread beside the loop.
    @app.get("/overspill/devices")
    def memory_of_devices() -> list[dict[str, Any]]:
        names = ("name", "description", "kind", "free_bytes", "total_bytes")
        return [{name: getattr(device, name) for name in names} for device in devices()]

    @app.post("/overspill/markdown")
    def markdown(request: _Text) -> dict[str, str]:
        return {"html": str(render_markdown(request.text))}


def _policy(page: str) -> str:
    """Return the content security policy: the page's own script and style, this server, and nothing else."""
    return (
        f"default-src 'none'; script-src {_hash(page, 'script')}; style-src {_hash(page, 'style')}; "
        "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(page: str, tag: str) -> str:
    """Return the hash of the content of the page's only element with a tag, as policies have it."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
