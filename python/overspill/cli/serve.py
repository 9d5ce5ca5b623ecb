"""``overspill serve``: models for every program that speaks OpenAI's API."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import secrets
from pathlib import Path
from typing import Annotated

import typer

from overspill.catalogue.disk import models_on_disk, without_repetition
from overspill.cli.exits import guarded_command
from overspill.cli.options import LoadOptions, Verbose, complete_model, loads_a_model
from overspill.cli.output import errors
from overspill.hub import resolve

__all__ = ["serve"]

_KEY = "OVERSPILL_API_KEY"


@loads_a_model()
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODELS]",
            help="GGUF files, or names that overspill list shows. Default: all models on this disk.",
            show_default=False,
            autocompletion=complete_model,
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen at.")] = 8080,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help=f"A key that requests must have, or {_KEY} in the environment; may be repeated."),
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Answer everybody who reaches another address.")] = False,
    origin: Annotated[
        list[str] | None, typer.Option(help="An origin whose pages may ask from a browser; may be repeated.")
    ] = None,
    most_requests: Annotated[
        int, typer.Option(min=1, max=65536, help="Requests that run or wait at a time; more are refused.")
    ] = 64,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.1, max=1e6, help="Seconds for a request, its waiting included.")
    ] = 600.0,
    body_mib: Annotated[int, typer.Option("--body", min=1, max=4096, help="MiB of a request's body.")] = 16,
    *,
    loading: LoadOptions,
    verbose: Verbose = False,
) -> None:
    """Answer requests of OpenAI's API, until Ctrl-C.

    A model is loaded when the first request names it. Requests that come together are decoded together.
    """
    with guarded_command(verbose=verbose):
        try:
            from overspill.server.app import Limits, make_app
            from overspill.server.models import Models
            from overspill.server.run import run
        except ModuleNotFoundError as error:
            raise ValueError(f"the server needs {error.name}: pip install 'overspill[server]'") from None
        keys = api_key or [key for key in [os.environ.get(_KEY)] if key]
        if not (keys or no_auth or _is_loopback(host)):
            raise ValueError(
                f"--host {host} lets others in: give them --api-key, such as {secrets.token_urlsafe(24)}, "
                "or --no-auth, and everybody who reaches it may use the models"
            )
        files = _files(models)
        for file in files.values() if models else ():
            loading.model(file)  # a file that is none is told now, and not to whoever asks
        served = Models(files, loading.model, loading.given(), lambda line: errors.print(line, soft_wrap=True))
        limits = Limits(most_requests=most_requests, timeout_s=timeout_s, body_bytes=body_mib << 20)
        closing = asyncio.Event()
        app = make_app(served, limits=limits, closing=closing, api_keys=keys, origins=origin or ())
        shown = f"[{host}]" if ":" in host else host
        errors.print(f"serving {', '.join(files)} at http://{shown}:{port}/v1", soft_wrap=True)
        run(app, closing, host, port, verbose=verbose)


def _files(names: list[str] | None) -> dict[str, Path]:
    """Return the file of each model by the name that requests have."""
    if not names:
        found = {model.name: model.file for model in without_repetition(models_on_disk())}
        if not found:
            raise ValueError("there are no models on this disk: give a GGUF file, or see `overspill pull`")
        return found
    files: dict[str, Path] = {}
    for name in names:
        file = resolve(name)
        short = file.stem if file.suffix == ".gguf" and Path(name).name == file.name else name
        if short in files:
            raise ValueError(f"two models would have the name {short}")
        files[short] = file
    return files


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
