"""A placement as JSON, in a file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from overspill._core import Error
from overspill.base.checks import as_integer, as_list, as_mapping, as_path, as_text, naming, shown
from overspill.base.files import read_json
from overspill.header.tensor_names import layer_of
from overspill.placement.assignment import Assignment
from overspill.placement.device_names import CPU, find_device, gpu_names
from overspill.placement.layer_numbers import format_numbers, layer_runs, parse_numbers
from overspill.placement.outline import PARTS, LayerPart, ModelOutline

__all__ = ["checked_expert_cache", "checked_kv_bytes", "from_dict", "read_file", "to_dict", "write_file"]


def to_dict(assignment: Assignment) -> dict[str, Any]:
    """Return an assignment as a dict for JSON, with the identity of its model."""
    model, layers = assignment.model, list[dict[str, str]]()
    for run in layer_runs(model.n_layers, lambda layer: tuple(assignment.parts[part][layer] for part in PARTS)):
        parts = ((part, assignment.parts[part][run[0]]) for part in model.layer_parts)
        layers.append({"layers": format_numbers(run)} | dict(parts))
    data: dict[str, Any] = {
        "model": {
            "architecture": model.architecture,
            "name": model.name,
            "n_layers": model.n_layers,
            "tensor_bytes": _fold_tensors(model.tensors),
        },
        "devices": list(assignment.devices),
        "layers": layers,
        "output": assignment.output,
        "embedding": assignment.embedding,
        "overrides": [list(override) for override in assignment.overrides],
    }
    if assignment.expert_cache:
        data["expert_cache"] = dict(assignment.expert_cache)
    if assignment.kv_bytes_by_layer is not None:
        data["kv_bytes_by_layer"] = list(assignment.kv_bytes_by_layer)
    return data


def from_dict(data: Mapping[str, Any]) -> Assignment:
    """Return the assignment that :func:`to_dict` gave ``data`` for.

    Raises
    ------
    ValueError
        ``data`` is not of that form.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"this is no placement: {shown(data)}")
    try:
        return _read(data)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        detail = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"this is no placement: {' '.join(detail.split())}") from None


def _read(data: Mapping[str, Any]) -> Assignment:
    model = data["model"]
    n_layers = as_integer("n_layers", model["n_layers"], 0, 4096)
    tensors = _unfold_tensors(model["tensor_bytes"], n_layers)
    architecture, name = (as_text(key, model[key]) for key in ("architecture", "name"))
    outline = ModelOutline(architecture, name, n_layers, tensors)
    devices = (*gpu_names(data["devices"]), CPU)
    parts: dict[LayerPart, list[str]] = {part: [CPU] * n_layers for part in PARTS}
    missing = set(range(n_layers))
    for run in data["layers"]:
        layers = parse_numbers("layers", run["layers"], n_layers)
        missing.difference_update(layers)
        for part in outline.layer_parts:
            for layer in layers:
                parts[part][layer] = find_device(devices, run[part])
    if missing:
        raise ValueError(f"layers {format_numbers(missing)} are missing")
    output, embedding = (find_device(devices, data[part]) for part in ("output", "embedding"))
    kv_bytes = data.get("kv_bytes_by_layer")
    sizes = None if kv_bytes is None else checked_kv_bytes(kv_bytes, n_layers)
    pools = checked_expert_cache(data.get("expert_cache", {}), devices)
    assignment = Assignment(outline, devices, parts, output, embedding, kv_bytes_by_layer=sizes, expert_cache=pools)
    for pattern, device in data["overrides"]:
        assignment = assignment.overridden(pattern, device)
    return assignment


def checked_kv_bytes(sizes: object, n_layers: int) -> list[int]:
    """Return the bytes of each layer's KV cache, or raise an error if they are not."""
    listed = as_list("kv_bytes_by_layer", sizes, "bytes")
    if len(listed) != n_layers:
        raise ValueError(f"kv_bytes_by_layer must be a number for each of the {n_layers} layers, not {len(listed)}")
    return [as_integer("kv_bytes_by_layer", size, 0, 2**63 - 1) for size in listed]


def checked_expert_cache(pools: object, devices: Sequence[str]) -> dict[str, int]:
    """Return the bytes by GPU, without those that are 0, or raise an error if they are not for GPUs of ``devices``."""
    found = {}
    for device, size in as_mapping("expert_cache", pools, "a mapping from GPUs to bytes").items():
        with naming("expert_cache"):
            name = find_device(devices, as_text("device", device))
        if name == CPU:
            raise ValueError("expert_cache must be on GPUs: experts that are not there are in RAM anyway")
        found[name] = as_integer(f"expert_cache[{name!r}]", size, 0, 2**63 - 1)
    return {name: size for name, size in found.items() if size}


def write_file(path: str | os.PathLike[str], assignment: Assignment) -> None:
    """Write an assignment to a file, as JSON; an Error if it cannot be written."""
    file = as_path("path", path)
    text = json.dumps(to_dict(assignment), indent=1, ensure_ascii=False)
    try:
        file.write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise Error(f"{file}: {error.strerror or error}") from None


def read_file(path: str | os.PathLike[str]) -> Assignment:
    """Return the assignment in a file.

    Raises
    ------
    ValueError
        The file holds no placement.
    Error
        The file cannot be read.
    """
    data = read_json(as_path("path", path))
    try:
        return from_dict(data)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None


def _fold_tensors(tensors: Mapping[str, int]) -> dict[str, int]:
    """Return bytes by name, with one name for all layers whose tensor is as large: ``blk.0-35.attn_q.weight``."""
    folded: dict[tuple[str, str, int], list[int]] = {}
    for name, n_bytes in tensors.items():
        layer = layer_of(name)
        before, middle, after = (name, "", "") if layer is None else name.partition(f"blk.{layer}.")
        folded.setdefault((before, after if middle else "", n_bytes), []).extend([] if layer is None else [layer])
    return {
        f"{before}blk.{format_numbers(layers)}.{after}" if layers else before: n_bytes
        for (before, after, n_bytes), layers in folded.items()
    }


def _unfold_tensors(folded: Mapping[str, int], n_layers: int) -> dict[str, int]:
    tensors: dict[str, int] = {}
    for key, n_bytes in folded.items():
        found = re.fullmatch(r"((?:enc\.|dec\.)?blk\.)([\d,-]+)(\..+)", key)
        layers = parse_numbers(key, found[2], n_layers) if found else []
        names = [f"{found[1]}{layer}{found[3]}" for layer in layers] if found else [key]
        tensors |= dict.fromkeys(names, as_integer(key, n_bytes, 0, 2**63 - 1))
    return tensors
