"""A placement in llama.cpp's own terms: devices, numbers of layers, overrides, and flags of its server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from overspill.base.text import short_repr
from overspill.base.units import format_count
from overspill.placement.assignment import Assignment
from overspill.placement.device_names import CPU
from overspill.placement.patterns import patterns_for

__all__ = ["LlamaPlacement", "llama_arguments", "server_flags"]

_MAX_GPUS = 16  # llama_max_devices()
_SERVER_FLAGS = {
    "n_ctx": "--ctx-size",
    "n_batch": "--batch-size",
    "n_ubatch": "--ubatch-size",
    "n_threads": "--threads",
    "type_k": "--cache-type-k",
    "type_v": "--cache-type-v",
    "flash_attention": "--flash-attn",
    "load_mode": "--load-mode",
    "rpc": "--rpc",
}
_SERVER_LOAD_MODES = {"read": "none", "direct-io": "dio"}


@dataclass(frozen=True, slots=True)
class LlamaPlacement:
    """A placement in llama.cpp's own terms."""

    devices: list[str]
    """GPUs in the order of their layers, then GPUs that hold only overridden tensors."""
    tensor_split: list[int]
    """Number of layers of each device; the output head counts as the last layer."""
    n_gpu_layers: int
    """Number of layers that are not on the CPU, the output head included."""
    overrides: list[tuple[str, str]]
    """Regular expressions (ECMAScript's) over the names of tensors, and their devices; the first that matches wins."""

    def __repr__(self) -> str:
        """Return the devices, and the numbers of layers and overrides, in brackets."""
        layers = f"{format_count(self.n_gpu_layers, 'layer')} on {', '.join(self.devices) or 'no GPU'}"
        return short_repr(self, f"{layers}, {format_count(len(self.overrides), 'override')}")


def llama_arguments(assignment: Assignment) -> LlamaPlacement:
    """Return the arguments that make llama.cpp place everything so; see :meth:`Placement.llama_arguments`."""
    model, runs = assignment.model, _runs(assignment)
    output = runs[-1][0] if runs else CPU
    matrix, embedding = assignment.output_matrix, assignment.tensors.get("token_embd.weight", CPU)
    moved = dict(_moved(assignment, output))
    if model.tied:
        if matrix not in (output, embedding) or (matrix != embedding and embedding != CPU):
            raise ValueError(
                f"llama.cpp cannot keep the tied embedding on {embedding} and its copy for the output on {matrix}"
                + (f", since the last layers are on {output}" if matrix != output else "")
                + ": put both on one device"
            )
        if matrix == embedding and matrix != output:
            moved["token_embd.weight"] = matrix
    split = dict(runs)
    split |= dict.fromkeys((gpu for gpu in assignment.devices[:-1] if gpu not in split and gpu in moved.values()), 0)
    if len(split) > _MAX_GPUS:
        raise ValueError(f"llama.cpp takes at most {_MAX_GPUS} GPUs, not {len(split)}")
    overrides = patterns_for(moved, model.tensors, assignment.devices)
    return LlamaPlacement(list(split), list(split.values()), sum(split.values()), overrides)


def _runs(assignment: Assignment) -> list[tuple[str, int]]:
    """Return each GPU's number of layers, in their order; the output counts as the last layer."""
    kv = assignment.kv
    n_cpu = next((layer for layer, device in enumerate(kv) if device != CPU), len(kv))
    runs = [(device, len(list(run))) for device, run in groupby(kv[n_cpu:])]
    layer = n_cpu
    for index, (device, n) in enumerate(runs):
        if device == CPU:
            raise ValueError(
                "kv: llama.cpp keeps the KV cache of the first layers on the CPU and that of the others on GPUs, "
                f"so layer {layer}'s cannot be on the CPU after layer {layer - 1}'s on {runs[index - 1][0]}"
            )
        if device in dict(runs[:index]):
            raise ValueError(
                f"kv: llama.cpp gives each GPU one run of layers with their KV cache, so layer {layer}'s "
                f"cannot be on {device} again after layer {layer - 1}'s on {runs[index - 1][0]}"
            )
        layer += n
    output = assignment.output_matrix
    if output != CPU and output not in dict(runs):
        runs.append((output, 1))
    elif runs:
        runs[-1] = (runs[-1][0], runs[-1][1] + 1)
    return runs


def _moved(assignment: Assignment, output: str) -> Iterator[tuple[str, str]]:
    """Yield each tensor that is elsewhere than where llama.cpp would put it, and its device."""
    model = assignment.model
    for name, device in assignment.tensors.items():
        layer = model.layer_of[name]
        if layer is not None:
            usual = assignment.kv[layer]
        elif model.parts[name] == "embedding":
            usual = CPU
        elif model.with_output(name):
            usual = output
        else:
            usual = assignment.kv[0] if model.n_layers else CPU
        if device != usual:
            yield name, device


def server_flags(arguments: LlamaPlacement, buffer_types: Mapping[str, str], settings: Mapping[str, Any]) -> list[str]:
    """Return the flags of ``llama-server`` for a placement; see :meth:`Placement.server_flags`."""
    flags = ["--device", ",".join(arguments.devices) or "none", "--n-gpu-layers", str(arguments.n_gpu_layers)]
    if len(arguments.devices) > 1 and arguments.n_gpu_layers:
        flags += ["--tensor-split", ",".join(map(str, arguments.tensor_split))]
    if arguments.overrides:
        pairs = [f"{pattern}={buffer_types.get(device, device)}" for pattern, device in arguments.overrides]
        flags += ["--override-tensor", ",".join(pairs)]
    # Otherwise llama-server changes other settings, such as the context, until it thinks that everything fits.
    flags += ["--fit", "off"]
    for name, value in settings.items():
        if name not in _SERVER_FLAGS:
            raise TypeError(f"{name} is none of {', '.join(_SERVER_FLAGS)}")
        if value is not None:
            text = ",".join(value) if name == "rpc" and not isinstance(value, str) else str(value)
            flags += [_SERVER_FLAGS[name], _SERVER_LOAD_MODES.get(text, text) if name == "load_mode" else text]
    # RPC devices have to be known before they are named.
    if "--rpc" in flags:
        at = flags.index("--rpc")
        flags = flags[at : at + 2] + flags[:at] + flags[at + 2 :]
    return flags
