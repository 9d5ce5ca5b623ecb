"""``overspill doctor``: what makes decoding slow on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

import overspill
from overspill.base.tables import plain_table
from overspill.cli.exits import guarded_command
from overspill.cli.options import MODEL, Json, Loading, Threads, complete_model, only_given
from overspill.cli.output import report_output
from overspill.hub import resolve
from overspill.studies.doctor.findings import examine

__all__ = ["doctor"]


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help=MODEL,
            show_default=False,
            autocompletion=complete_model,
        ),
    ] = None,
    n_threads: Threads = None,
    load_mode: Loading = None,
    as_json: Json = False,
) -> None:
    """Find causes of slow decoding here, of MODEL in particular, and remedies; nothing is loaded."""
    with guarded_command():
        header = None if model is None else overspill.ModelInfo.from_file(resolve(model))
        found = examine(header, n_threads=n_threads, **only_given(load_mode=load_mode))
        if as_json:
            print(json.dumps([asdict(finding) for finding in found], indent=2))
            return
        table = plain_table("", "")
        table.show_header = False
        for finding in found:
            style = {"bad": "bold red", "warning": "yellow", "fine": "green"}[finding.severity]
            said = Text.assemble((finding.title, "bold"), f"\n{finding.reading}")
            if finding.advice:
                said.append(f"\n→ {finding.advice}")
            table.add_row(Text(finding.severity, style), said)
        report_output().print(table)
