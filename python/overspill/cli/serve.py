"""``overspill serve``: models for every program that speaks OpenAI's API."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from overspill.cascade.cascade import CASCADE
from overspill.catalogue.disk import models_on_disk, without_repetition
from overspill.cli.exits import guarded_command
from overspill.cli.options import LoadOptions, Verbose, complete_model, loads_a_model
from overspill.cli.output import errors
from overspill.engine.model import Model
from overspill.hub import resolve

__all__ = ["serve"]

_KEY = "OVERSPILL_API_KEY"


@loads_a_model()
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODELS]",
            help="GGUF files, or names that overspill list shows, or cascade:SMALL,LARGE with two of them. "
            "Default: all models on this disk.",
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
            from overspill.server.access import is_loopback
            from overspill.server.app import Limits, make_app
            from overspill.server.models import Models
            from overspill.server.run import run
        except ModuleNotFoundError as error:
            raise ValueError(f"the server needs {error.name}: pip install 'overspill[server]'") from None
        keys = api_key or [key for key in [os.environ.get(_KEY)] if key]
        if not (keys or no_auth or is_loopback(host)):
            raise ValueError(
                f"--host {host} lets others in: give them --api-key, such as {secrets.token_urlsafe(24)}, "
                "or --no-auth, and everybody who reaches it may use the models"
            )
        files, cascades = _files(models)
        _check(loading, [*files.values()][: None if models else 1])
        served = Models(files, cascades, loading.model, loading.given(), partial(errors.print, soft_wrap=True))
        limits = Limits(most_requests=most_requests, timeout_s=timeout_s, body_bytes=body_mib << 20)
        closing = asyncio.Event()
        app = make_app(
            served, limits=limits, closing=closing, api_keys=keys, origins=origin or (), is_local=is_loopback(host)
        )
        shown = f"[{host}]" if ":" in host else host
        errors.print(f"serving {', '.join([*files, *cascades])} at http://{shown}:{port}/v1", soft_wrap=True)
        run(app, closing, host, port, verbose=verbose)


def _files(names: list[str] | None) -> tuple[dict[str, Path], list[str]]:
    """Return the file of each model by the name that requests have, and the names of cascades."""
    if not names:
        found = {model.name: model.file for model in without_repetition(models_on_disk())}
        if not found:
            raise ValueError("there are no models on this disk: give a GGUF file, or see `overspill pull`")
        return found, []
    files: dict[str, Path] = {}
    cascades = []

    def add(name: str) -> str:
        file = resolve(name)
        short = file.stem if file.suffix == ".gguf" and Path(name).name == file.name else name
        if files.setdefault(short, file) != file:
            raise ValueError(f"two models would have the name {short}")
        return short

    for name in names:
        if name.startswith(CASCADE):
            pair = name.removeprefix(CASCADE).split(",")
            if len(pair) != 2:
                raise ValueError(f"a cascade is {CASCADE}SMALL,LARGE with two models, not {name}")
            cascades.append(CASCADE + ",".join(map(add, pair)))
        else:
            add(name)
    return files, cascades


def _check(loading: LoadOptions, files: Sequence[Path]) -> None:
    """Raise what is wrong with the files or the options now, rather than when somebody asks."""
    infos = [loading.model(file) for file in files]
    Model(infos[0], vocab_only=True, **loading.given()).close()
