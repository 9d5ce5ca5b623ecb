"""``overspill devices``: the devices that models can run on."""

from __future__ import annotations

import json
from dataclasses import asdict

import overspill
from overspill.base.tables import plain_table
from overspill.base.units import format_bytes
from overspill.cli.exits import guarded_command
from overspill.cli.options import Json
from overspill.cli.output import report_output

__all__ = ["devices"]


def devices(as_json: Json = False) -> None:
    """List the devices that models can run on."""
    with guarded_command():
        found = overspill.devices()
        if as_json:
            print(json.dumps([asdict(device) for device in found], indent=2))
            return
        table = plain_table(
            "name", "kind", "backend", "free", "total", "description", left=("name", "kind", "backend", "description")
        )
        for device in found:
            row = (device.name, device.kind.replace("_", " "), device.backend)
            table.add_row(
                *row,
                format_bytes(device.free_bytes, digits=2),
                format_bytes(device.total_bytes, digits=2),
                device.description,
            )
        report_output().print(table)
