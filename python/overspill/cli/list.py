"""``overspill list``: the models on the disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import overspill
from overspill.base.tables import plain_table
from overspill.base.units import format_bytes
from overspill.catalogue.disk import FoundModel, models_on_disk, without_repetition
from overspill.catalogue.model_files import quantisation_in
from overspill.cli.exits import guarded_command
from overspill.cli.options import Json
from overspill.cli.output import errors, report_output
from overspill.planning.verdict import Verdict

__all__ = ["list"]

# Kinds of GGUF files that no text comes from.
_NO_MODELS = ("adapter", "imatrix", "mmproj", "vocab")


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    file_bytes: int
    quantisation: str
    source: str
    verdict: Verdict | None  # None where no plan could be made
    file: str


def list(as_json: Json = False) -> None:  # noqa: A001  # the command's name
    """List the models on this disk: of Hugging Face, LM Studio, Ollama, llama.cpp and the folders of OVERSPILL_MODELS.

    Each is there once, with the name that every command takes. Whether it fits is planned for the memory that is free
    now; nothing is loaded or measured.
    """
    with guarded_command():
        hardware = overspill.Hardware.here(measure=False)
        found = [row for model in without_repetition(models_on_disk()) if (row := _row(model, hardware))]
        if as_json:
            print(json.dumps([asdict(row) for row in found], indent=2))
        elif not found:
            errors.print("There are no models here. `overspill pull hf:OWNER/REPOSITORY` downloads one.")
        else:
            table = plain_table(
                "name", "size", "quantisation", "from", "fits", left=("name", "quantisation", "from", "fits")
            )
            for row in found:
                table.add_row(
                    " ".join(row.name.split()),
                    format_bytes(row.file_bytes),
                    row.quantisation,
                    row.source,
                    row.verdict or "unknown",
                )
            report_output().print(table)


def _row(model: FoundModel, hardware: overspill.Hardware) -> _Row | None:
    """Return what to show of a model; None if its file cannot be read, or is no model."""
    try:
        info = overspill.ModelInfo.from_file(model.file)
    except (overspill.Error, ValueError):
        return None
    if info.architecture == "clip" or info.metadata.get("general.type") in _NO_MODELS or not info.tensors:
        return None
    kind = quantisation_in(model.file.name) or info.quantisation
    return _Row(model.name, info.file_bytes, kind, model.source, _verdict(info, hardware), str(model.file))


def _verdict(info: overspill.ModelInfo, hardware: overspill.Hardware) -> Verdict | None:
    try:
        # Other batches and a cache of experts take longer to plan, and change little in what fits.
        return overspill.plan(info, hardware=hardware, n_ubatch=512, experts="static").forecast().verdict
    except (overspill.Error, ValueError):  # of an architecture that cannot be planned
        return None
