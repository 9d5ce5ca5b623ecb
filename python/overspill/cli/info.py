"""``overspill info``: what the header of a model's file says."""

from __future__ import annotations

import json
from dataclasses import asdict

import overspill
from overspill.base.tables import plain_table
from overspill.base.units import format_bytes
from overspill.cli.exits import guarded_command
from overspill.cli.options import Json, ModelFile
from overspill.cli.output import report_output
from overspill.hub import resolve

__all__ = ["info"]


_JSON_FIELDS = (
    "name",
    "architecture",
    "licence",
    "n_parameters",
    "quantisation",
    "n_layers",
    "n_experts",
    "n_experts_used",
    "n_embd",
    "n_vocab",
    "n_ctx_train",
    "files",
    "file_bytes",
    "bytes_per_token",
    "bytes_by_part",
    "bytes_by_type",
)


def info(model: ModelFile, as_json: Json = False) -> None:
    """Show a model's architecture, layers, sizes and sampling, from its file's header."""
    with guarded_command():
        header = overspill.ModelInfo.from_file(resolve(model))
        if as_json:
            data = {name: getattr(header, name) for name in _JSON_FIELDS} | {"sampling": asdict(header.sampling)}
            print(json.dumps(data, indent=2))
        else:
            _print_info(header)


def _print_info(header: overspill.ModelInfo) -> None:
    experts = f"{header.n_experts}, {header.n_experts_used} used per token" if header.n_experts else "none"
    facts: dict[str, object] = {
        "name": header.name or "unknown",
        "architecture": header.architecture,
        "licence": header.licence or "not stated",
        "parameters": f"{header.n_parameters:,}",
        "quantisation": f"{header.quantisation} ({', '.join(header.bytes_by_type)})",
        "layers": header.n_layers,
        "experts": experts,
        "width": header.n_embd,
        "vocabulary": f"{header.n_vocab:,}",
        "context": f"{header.n_ctx_train:,} tokens",
        "files": f"{len(header.files)}, {format_bytes(header.file_bytes, digits=2)}",
        "read per token": format_bytes(header.bytes_per_token, digits=2),
        "sampling": f"{header.sampling} ({'of the file' if header.recommends_sampling else 'defaults'})",
    }
    summary = plain_table("", "")
    summary.show_header = False
    for label, value in facts.items():
        summary.add_row(label, str(value))
    sizes = plain_table("part", "size", "share")
    total = sum(header.bytes_by_part.values()) or 1
    for part, n_bytes in header.bytes_by_part.items():
        if n_bytes:
            label = "embedding, output too" if part == "embedding" and header.tied_embedding else part
            sizes.add_row(label, format_bytes(n_bytes, digits=2), f"{n_bytes / total:.1%}")
    output = report_output()
    output.print(summary)
    output.print()
    output.print(sizes)
