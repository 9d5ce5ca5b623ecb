"""What lies on which device: a value that can be made, edited, shown, saved, and handed to llama.cpp."""

from __future__ import annotations

import io
import json
import operator
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, SupportsIndex, cast, overload

from rich.console import Console, Group

from overspill.base.checks import as_integer
from overspill.base.units import format_bytes
from overspill.header.info import ModelInfo
from overspill.header.tensor_names import Part
from overspill.placement.device_names import CPU, Devices, _gpu_names, _name
from overspill.placement.file import _fold_tensors, _unfold_tensors
from overspill.placement.layer_numbers import Layers, _format_numbers, _parse_numbers
from overspill.placement.llama import _MAX_GPUS, _SERVER_FLAGS, _SERVER_LOAD_MODES, LlamaPlacement
from overspill.placement.outline import PARTS, LayerPart, _ModelOutline
from overspill.placement.patterns import patterns_for
from overspill.placement.rules import mapping_rules
from overspill.placement.table import Cell, PlacementTable

__all__ = ["Placement"]


class _LayerPart:
    """A part of one layer, as an attribute."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._part = name

    def __get__(self, layer: Layer, owner: type) -> str | None:
        return layer._placement._part_device(layer._index, self._part)

    def __set__(self, layer: Layer, device: str) -> None:
        layer._placement.assign(layers=layer._index, part=self._part, device=device)


class _LayersPart:
    """A part of several layers, as an attribute."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._part = name

    def __get__(self, layers: LayerRange, owner: type) -> tuple[str | None, ...]:
        return tuple(layers._placement._part_device(layer, self._part) for layer in layers._indices)

    def __set__(self, layers: LayerRange, device: str) -> None:
        layers._placement.assign(layers=layers._indices, part=self._part, device=device)


class Layer:
    """The parts of one layer: a device, ``"mixed"``, or None for a part that it lacks; assign a device to move one."""

    __slots__ = ("_index", "_placement")
    attention = _LayerPart()
    dense = _LayerPart()
    experts = _LayerPart()
    kv = _LayerPart()

    def __init__(self, placement: Placement, index: int) -> None:
        """Look at one layer; ``placement.layers[i]`` makes these."""
        self._placement, self._index = placement, index

    def __repr__(self) -> str:
        return f"<layer {self._index}: " + ", ".join(f"{part} {getattr(self, part)}" for part in PARTS) + ">"


class LayerRange:
    """The parts of several layers, as tuples; assign a device to move a part of all of them that have it."""

    __slots__ = ("_indices", "_placement")
    attention = _LayersPart()
    dense = _LayersPart()
    experts = _LayersPart()
    kv = _LayersPart()

    def __init__(self, placement: Placement, indices: Sequence[int]) -> None:
        """Look at several layers; ``placement.layers[i:j]`` makes these."""
        self._placement, self._indices = placement, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Layer]:
        return (Layer(self._placement, index) for index in self._indices)

    def __repr__(self) -> str:
        return f"<layers {_format_numbers(self._indices)}>"


class LayerSequence:
    """The layers of a placement: take one, or a slice."""

    __slots__ = ("_placement",)

    def __init__(self, placement: Placement) -> None:
        """Look at all layers; ``placement.layers`` makes these."""
        self._placement = placement

    def __len__(self) -> int:
        return self._placement.n_layers

    def __iter__(self) -> Iterator[Layer]:
        return (Layer(self._placement, index) for index in range(len(self)))

    @overload
    def __getitem__(self, index: SupportsIndex) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> LayerRange: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Layer | LayerRange:
        """Return the :class:`Layer` of that number, or the :class:`LayerRange` of a slice."""
        indices = self._placement._selected(index)
        return LayerRange(self._placement, indices) if isinstance(index, slice) else Layer(self._placement, indices[0])


class Placement:
    """Which device each part of a model lies on.

    Parts of a layer are ``attention``, ``dense`` (feed-forward parts that every token passes through, routers
    included), ``experts`` and ``kv``; besides there are ``output`` and ``embedding``. Devices go by
    llama.cpp's names, in any case; ``"gpu"`` stands for the first that is not the CPU. Two placements are equal
    if everything lies on the same devices.

    >>> placement = Placement.gpu(info, ["CUDA0"])
    >>> placement.layers[10:20].experts = "cpu"
    >>> placement.assign(part="experts", layers=range(5), device="cpu")
    >>> placement.override(r"ffn_down_exps", "cpu")
    >>> print(placement)

    Parameters
    ----------
    info
        The model.
    devices
        The GPUs: their names, or what :func:`overspill.devices` returns, or anything with ``devices``. The CPU
        need not be among them.
    default
        Where layers, their KV cache and the output head lie. The embedding is on the CPU, where llama.cpp keeps
        it, too, since a token reads only a row of it.

    Raises
    ------
    ValueError
        No such device, or the same one twice.
    """

    kv_bytes_by_layer: Sequence[int] | None = None
    """Bytes of each layer's KV cache, if known; only shown."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, info: ModelInfo | _ModelOutline, devices: Devices = (), *, default: str = CPU) -> None:
        """Put everything on one device."""
        self._model = _ModelOutline.of(info) if isinstance(info, ModelInfo) else info
        self._devices = (*_gpu_names(devices), CPU)
        device = self._device(default)
        self._parts = {part: [device] * self.n_layers for part in PARTS}
        self._output, self._embedding = device, CPU
        self._overrides: list[tuple[str, str]] = []
        self._located: dict[str, str] | None = None

    @classmethod
    def cpu(cls, info: ModelInfo) -> Placement:
        """Return the placement that leaves everything on the CPU and touches no GPU."""
        return cls(info)

    @classmethod
    def gpu(cls, info: ModelInfo, devices: Devices) -> Placement:
        """Return the placement that has all layers and the output head on GPUs; see :meth:`from_layers`."""
        return cls.from_layers(info, devices, info.n_layers + 1)

    @classmethod
    def from_layers(cls, info: ModelInfo, devices: Devices, n_gpu_layers: int) -> Placement:
        """Return a placement by whole layers, counted as llama.cpp does.

        Parameters
        ----------
        info
            The model.
        devices
            As for the class. Several GPUs share the layers in their order, by ``memory_bytes`` or ``free_bytes``
            if they have it, else evenly.
        n_gpu_layers
            The output head is the first, the last layers come next; from 0. More than there are means all.

        Raises
        ------
        ValueError
            Fewer than 0, or there is no GPU to put them on.
        """
        devices = list(devices if isinstance(devices, Iterable) else devices.devices)
        placement = cls(info, devices)
        n = min(as_integer("n_gpu_layers", n_gpu_layers, 0, 2**31 - 1), info.n_layers + 1)
        if n == 0:
            return placement
        gpus = [placement._device("gpu"), *placement.devices[1:-1]]
        by_name = {_name(device): device for device in devices}
        sizes = [getattr(by_name[gpu], "memory_bytes", getattr(by_name[gpu], "free_bytes", 0)) for gpu in gpus]
        limits = [*accumulate(sizes if any(sizes) else [1] * len(gpus))]
        for index in range(n):
            gpu = gpus[next(i for i, limit in enumerate(limits) if limit * n > index * limits[-1])]
            layer = info.n_layers + 1 - n + index
            if layer < info.n_layers:
                for part in PARTS:
                    placement._parts[part][layer] = gpu
            else:
                placement._output = gpu
        return placement

    @classmethod
    def from_mapping(cls, info: ModelInfo, devices: Devices, mapping: Mapping[str, Any]) -> Placement:
        """Return the placement that :meth:`apply` makes of ``mapping``.

        Its key ``"default"`` says where to begin: ``"cpu"`` (if missing), ``"gpu"`` (layers on all GPUs),
        the name of a device, or a number of layers as for :meth:`from_layers`.
        """
        rules = dict(mapping)
        default = rules.pop("default", CPU)
        if isinstance(default, int) and not isinstance(default, bool):
            placement = cls.from_layers(info, devices, default)
        elif isinstance(default, str) and default.lower() == "gpu":
            placement = cls.gpu(info, devices)
        else:
            placement = cls(info, devices, default=default)
        placement.apply(rules)
        return placement

    @classmethod
    def from_offload(cls, info: ModelInfo, devices: Devices, offload: str | int | Mapping[str, Any]) -> Placement:
        """Return the placement for ``"cpu"``, ``"gpu"``, a number of layers, or a mapping.

        Raises
        ------
        ValueError, TypeError
            It is none of these, or cannot be.
        """
        if isinstance(offload, Mapping):
            return cls.from_mapping(info, devices, offload)
        if offload in ("cpu", "gpu") or (isinstance(offload, int) and not isinstance(offload, bool)):
            return cls.from_mapping(info, devices, {"default": offload})
        raise ValueError(f'offload must be "cpu", "gpu", a number of layers or a mapping, not {offload!r}')

    @property
    def model_name(self) -> str:
        """The name of the model that it is for."""
        return self._model.name

    @property
    def fingerprint(self) -> str:
        """Tells the model apart from others, by its architecture and its tensors' names and bytes."""
        return self._model.fingerprint

    @property
    def n_layers(self) -> int:
        """Number of layers of the model."""
        return self._model.n_layers

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that may be used, the CPU last."""
        return self._devices

    @property
    def devices_used(self) -> tuple[str, ...]:
        """The devices that anything lies on."""
        used = {*self._devices_by_tensor().values(), *self.kv, self.output_matrix}
        return tuple(device for device in self._devices if device in used)

    @property
    def layers(self) -> LayerSequence:
        """The layers, to look at and to edit: ``placement.layers[10:20].experts = "cpu"``."""
        return LayerSequence(self)

    @property
    def kv(self) -> tuple[str, ...]:
        """The device of each layer's KV cache."""
        return tuple(self._parts["kv"])

    @property
    def output(self) -> str:
        """The device of the output head (of a tied embedding: of its copy there), or ``"mixed"``."""
        return _one([*self._located_parts("output"), self.output_matrix])

    @output.setter
    def output(self, device: str) -> None:
        self.assign(part="output", device=device)

    @property
    def output_matrix(self) -> str:
        """The device of the matrix that makes logits; of a tied embedding, of its copy there."""
        if not self._model.tied:
            return self._devices_by_tensor().get("output.weight", self._output)
        # The override moves the embedding and its copy alike.
        overridden = any(re.search(pattern, "token_embd.weight") for pattern, _ in self._overrides)
        return self._devices_by_tensor()["token_embd.weight"] if overridden else self._output

    @property
    def embedding(self) -> str:
        """The device of the embedding, or ``"mixed"``."""
        return _one(self._located_parts("embedding") or [self._embedding])

    @embedding.setter
    def embedding(self, device: str) -> None:
        self.assign(part="embedding", device=device)

    @property
    def overrides(self) -> tuple[tuple[str, str], ...]:
        """Regular expressions over tensor names and their devices, in force over the parts; later ones win."""
        return tuple(self._overrides)

    def assign(self, *, part: str | Sequence[str], device: str, layers: Layers = None) -> None:
        """Put a part, or several, on a device.

        Parameters
        ----------
        part
            One or more of :data:`PARTS`; or ``"output"`` or ``"embedding"``, which have no layers.
        device
            A device's name, ``"cpu"`` or ``"gpu"``.
        layers
            A number, a slice, a range, or several numbers; negative ones count from the end. Default: all.
            Layers without the part are passed over, as long as one has it.

        Raises
        ------
        ValueError
            No such device, part or layer, or none of the layers has the part.
        """
        device = self._device(device)
        parts = [part] if isinstance(part, str) else list(part)
        indices = self._selected(layers)
        for one in parts:
            if one in ("output", "embedding"):
                if layers is not None:
                    raise ValueError(f"{one} belongs to no layer: leave layers out")
            elif one not in PARTS:
                raise ValueError(f"part must be one of {', '.join(PARTS)}, output or embedding, not {one!r}")
            elif one != "kv" and not any(one in self._model.layers[layer] for layer in indices):
                where = "it has" if layers is None else f"layers {_format_numbers(indices)} have"
                raise ValueError(f"{self._model}: {where} no {one}")
        for one in parts:
            if one == "output":
                self._output = device
            elif one == "embedding":
                self._embedding = device
            else:
                for layer in indices:
                    self._parts[cast(LayerPart, one)][layer] = device
        self._edited()

    def override(self, pattern: str, device: str | None) -> None:
        """Put the tensors whose names ``pattern`` finds on a device, whatever their parts are assigned to.

        Parameters
        ----------
        pattern
            A regular expression as Python's ``re.search`` takes it. Where several match, the last given holds.
        device
            A device's name, ``"cpu"`` or ``"gpu"``; None takes the override back.

        Raises
        ------
        ValueError
            It is no regular expression, matches no tensor, or there is no such device or no such override.
        """
        kept = [override for override in self._overrides if override[0] != pattern]
        if device is None:
            if len(kept) == len(self._overrides):
                raise ValueError(f"pattern: there is no override {pattern!r}")
        else:
            try:
                matches = any(map(re.compile(pattern).search, self._model.tensors))
            except re.error as error:
                raise ValueError(f"pattern: {pattern!r} is no regular expression: {error}") from None
            if not matches:
                raise ValueError(f"pattern: {pattern!r} matches no tensor of {self._model}")
            kept.append((pattern, self._device(device)))
        self._overrides = kept
        self._edited()

    def apply(self, mapping: Mapping[str, Any]) -> None:
        """Make several edits, in their order.

        Each key is a part (``"experts"``, ``"output"``, ...), layers (``"layers 0-9"``, ``"layers 0-3, 7"``, which
        means all their parts), a part of layers (``"layers 0-9 experts"``), or a regular expression between slashes
        (``"/ffn_down_exps/"``). Each value is a device; of layers, it may be a mapping from parts to devices.

        >>> placement.apply({"experts": "cpu", "layers 30-35": "gpu", "layers 0-2": {"dense": "cpu", "kv": "cpu"}})

        Raises
        ------
        ValueError, TypeError
            As :meth:`assign` and :meth:`override` do, or a key is none of these.
        """
        # All of them or, after a mistake, none.
        edited = self.copy()
        for rule in mapping_rules(mapping, self.n_layers):
            if rule.pattern is not None:
                edited.override(rule.pattern, rule.device)
                continue
            # All parts of a layer are only those that it has.
            every = rule.parts == PARTS
            selected = [self._model.layers[layer] for layer in self._selected(rule.layers)]
            parts = [part for part in rule.parts if not every or part == "kv" or any(part in one for one in selected)]
            edited.assign(layers=rule.layers, part=parts, device=rule.device)
        self.__dict__.update(edited.__dict__)

    def _edited(self) -> None:
        """Forget what was derived from the placement; every edit ends with this."""
        self._located = None

    def tensors(self) -> dict[str, str]:
        """Return the device of every tensor of the file, by name."""
        return dict(self._devices_by_tensor())

    def _devices_by_tensor(self) -> dict[str, str]:
        if self._located is None:
            compiled = [(re.compile(pattern), device) for pattern, device in reversed(self._overrides)]
            self._located = {
                name: next((device for pattern, device in compiled if pattern.search(name)), self._assigned(name))
                for name in self._model.tensors
            }
        return self._located

    def device_of(self, tensor: str) -> str:
        """Return the device of the tensor of that name.

        Of a tied embedding it is the embedding's: its copy for the output is on :attr:`output`. Tables that several
        layers share, as of rotary frequencies, are copied to each device with layers; it is the first one's.

        Raises
        ------
        ValueError
            The model has no tensor of that name.
        """
        if tensor not in self._model.tensors:
            raise ValueError(f"{self._model} has no tensor {tensor!r}")
        return self._devices_by_tensor()[tensor]

    def bytes_by_device(self) -> dict[str, int]:
        """Return the bytes of weights on each device that may be used, a copy of a tied embedding included."""
        sizes = dict.fromkeys(self._devices, 0)
        for name, device in self._devices_by_tensor().items():
            sizes[device] += self._model.tensors[name]
        if self._copied():
            sizes[self.output_matrix] += self._model.tensors["token_embd.weight"]
        return sizes

    def copy(self) -> Placement:
        """Return another one that is equal, to edit."""
        copy = Placement(self._model, self._devices)
        copy._parts = {part: list(devices) for part, devices in self._parts.items()}
        copy._output, copy._embedding, copy._overrides = self._output, self._embedding, list(self._overrides)
        copy.kv_bytes_by_layer = self.kv_bytes_by_layer
        return copy

    def read_back(self, tensors: Mapping[str, str], kv: Sequence[tuple[str, int]]) -> Placement:
        """Return a placement that says where things really are.

        Parameters
        ----------
        tensors
            Devices of tensors by name, as llama.cpp tells them; those that it does not tell are where they should be.
        kv
            Device and bytes of each layer's KV cache; empty if the model has none.
        """
        actual = self.copy()
        if len(kv) == self.n_layers:
            actual._parts["kv"] = [device for device, _ in kv]
            actual.kv_bytes_by_layer = [n_bytes for _, n_bytes in kv]
        actual._devices = (*self._devices[:-1], *sorted({*tensors.values(), CPU} - set(self._devices)), CPU)
        for name, device in tensors.items():
            if name in self._model.tensors and actual.device_of(name) != device and not actual._is_copy(name, device):
                actual.override(f"^{re.escape(name)}$", device)
        actual._edited()
        return actual

    def _is_copy(self, name: str, device: str) -> bool:
        return name == "token_embd.weight" and self._model.tied and device == self.output_matrix

    def check(self, info: ModelInfo, devices: Devices | None = None) -> None:
        """Raise a ValueError if this placement is not for this model, or uses other devices than these."""
        other = _ModelOutline.of(info)
        if other.fingerprint != self._model.fingerprint:
            differ = set(other.tensors.items()) ^ set(self._model.tensors.items())
            detail = f": they differ in {min(differ)[0]}" if str(other) == str(self._model) and differ else ""
            raise ValueError(f"this placement is for {self._model}, not for {other}{detail}")
        if devices is not None:
            known = (*_gpu_names(devices), CPU)
            for device in self.devices_used:
                if device not in known:
                    raise ValueError(f"this placement uses {device}, but the devices here are {', '.join(known)}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return (
            self._model.fingerprint == other._model.fingerprint
            and self.kv == other.kv
            and self.output_matrix == other.output_matrix
            and self._devices_by_tensor() == other._devices_by_tensor()
        )

    def __repr__(self) -> str:
        sizes = ", ".join(f"{device} {format_bytes(n)}" for device, n in self.bytes_by_device().items() if n)
        return f"<overspill.Placement of {self._model}: {sizes}>"

    # --- how it works

    def _device(self, device: str) -> str:
        if not isinstance(device, str):
            raise TypeError(f"device must be a string, not {device!r}")
        for name in self._devices:
            if name.lower() == device.lower():
                return name
        if device.lower() == "gpu":
            if len(self._devices) > 1:
                return self._devices[0]
            raise ValueError("device: there is no GPU among the devices of this placement")
        raise ValueError(f'device must be one of {", ".join(self._devices)}, "cpu" or "gpu", not {device!r}')

    def _selected(self, layers: Layers) -> list[int]:
        n = self.n_layers
        if layers is None:
            return list(range(n))
        if isinstance(layers, slice):
            selected = list(range(n))[layers]
            if not selected:
                raise ValueError(f"layers: {layers} selects none of the {n} layers")
            return selected
        if isinstance(layers, bool):
            raise TypeError("layers must be numbers, not a bool")
        selected = []
        for layer in layers if isinstance(layers, Iterable) else [layers]:
            try:
                index = operator.index(layer)
            except TypeError:
                raise TypeError(f"layers must be numbers, not {layer!r}") from None
            if not -n <= index < n:
                raise ValueError(f"layers must be 0 to {n - 1}, or -{n} to -1 from the end, not {index}")
            selected.append(index % n)
        if not selected:
            raise ValueError("layers: none are given")
        return selected

    def _assigned(self, name: str) -> str:
        """Return the device of a tensor without regard to overrides."""
        part, layer = self._model.parts[name], self._model.layer_of[name]
        if layer is not None:
            return self._parts[part if part in ("attention", "dense", "experts") else "kv"][layer]
        if part == "embedding":
            return self._embedding
        if part == "output" or self._model.with_output(name):
            return self._output
        return self._parts["kv"][0] if self.n_layers else CPU

    def _copied(self) -> bool:
        return self._model.tied and self.output_matrix != self._devices_by_tensor()["token_embd.weight"]

    def _located_parts(self, part: Part) -> list[str]:
        return [device for name, device in self._devices_by_tensor().items() if self._model.parts[name] == part]

    def _part_device(self, layer: int, part: str) -> str | None:
        if part == "kv":
            return self._parts["kv"][layer]
        names = self._model.layers[layer].get(part)
        tensors = self._devices_by_tensor()
        return _one([tensors[name] for name in names]) if names else None

    # --- to llama.cpp

    def llama_arguments(self) -> LlamaPlacement:
        """Return what makes llama.cpp place everything so.

        llama.cpp gives each layer a device, which holds its KV cache; any tensor may be moved from there, the
        KV cache not. The first layers are the CPU's, then each GPU has layers in one run, and the output head
        counts as the last layer.

        Raises
        ------
        ValueError
            llama.cpp cannot: the KV caches of the CPU's layers do not come first, those of a GPU are not in
            one run, or a tied embedding and the output would have to be moved apart.
        """
        runs, output = self._runs()
        matrix, embedding = self.output_matrix, self._devices_by_tensor().get("token_embd.weight", CPU)
        moved = dict(self._moved(output))
        if self._model.tied:
            if matrix not in (output, embedding) or (matrix != embedding and embedding != CPU):
                raise ValueError(
                    f"llama.cpp cannot keep the tied embedding on {embedding} and its copy for the output on {matrix}"
                    + (f", since the last layers are on {output}" if matrix != output else "")
                    + ": put both on one device"
                )
            if matrix == embedding and matrix != output:
                moved["token_embd.weight"] = matrix
        split = dict(runs)
        split |= dict.fromkeys((gpu for gpu in self._devices[:-1] if gpu not in split and gpu in moved.values()), 0)
        if len(split) > _MAX_GPUS:
            raise ValueError(f"llama.cpp takes at most {_MAX_GPUS} GPUs, not {len(split)}")
        overrides = patterns_for(moved, self._model.tensors, self._devices)
        return LlamaPlacement(list(split), list(split.values()), sum(split.values()), overrides)

    def _runs(self) -> tuple[list[tuple[str, int]], str]:
        """Return each GPU's number of layers, in their order, and the device of the output "layer"."""
        kv = self._parts["kv"]
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
        output = self.output_matrix
        if output != CPU and output not in dict(runs):
            runs.append((output, 1))
        elif runs:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        return runs, runs[-1][0] if runs else CPU

    def _moved(self, output: str) -> Iterator[tuple[str, str]]:
        """Yield the tensors that lie elsewhere than where llama.cpp would put them, and their devices."""
        for name, device in self._devices_by_tensor().items():
            layer = self._model.layer_of[name]
            if layer is not None:
                usual = self._parts["kv"][layer]
            elif self._model.parts[name] == "embedding":
                usual = CPU
            elif self._model.with_output(name):
                usual = output
            else:
                usual = self._parts["kv"][0] if self.n_layers else CPU
            if device != usual:
                yield name, device

    def server_flags(self, *, buffer_types: Mapping[str, str] | None = None, **settings: Any) -> list[str]:
        """Return the flags that make ``llama-server`` place everything so.

        Parameters
        ----------
        buffer_types
            llama.cpp's names of devices' buffer types where they are not the devices': ``RPC0[host:port]``.
        **settings
            More flags by our names: ``n_ctx``, ``n_batch``, ``n_ubatch``, ``n_threads``, ``type_k``, ``type_v``,
            ``flash_attention``, ``load_mode``, and ``rpc`` (endpoints). None leaves one out.

        Raises
        ------
        ValueError
            llama.cpp cannot; see :meth:`llama_arguments`.
        TypeError
            There is no such setting.
        """
        arguments = self.llama_arguments()
        flags = ["--device", ",".join(arguments.devices) or "none", "--n-gpu-layers", str(arguments.n_gpu_layers)]
        if len(arguments.devices) > 1 and arguments.n_gpu_layers:
            flags += ["--tensor-split", ",".join(map(str, arguments.tensor_split))]
        if arguments.overrides:
            names = buffer_types or {}
            pairs = [f"{pattern}={names.get(device, device)}" for pattern, device in arguments.overrides]
            flags += ["--override-tensor", ",".join(pairs)]
        # Otherwise llama-server changes what was left to it, such as the context, until it thinks that it fits.
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

    # --- JSON

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold, the model's identity included."""
        layers: list[dict[str, str]] = []
        for run in self._folded(lambda layer: [self._parts[part][layer] for part in PARTS]):
            parts = ((part, self._parts[part][run[0]]) for part in self._shown_parts())
            layers.append({"layers": _format_numbers(run)} | dict(parts))
        model = self._model
        data: dict[str, Any] = {
            "model": {
                "architecture": model.architecture,
                "name": model.name,
                "n_layers": model.n_layers,
                "tensor_bytes": _fold_tensors(model.tensors),
            },
            "devices": list(self._devices),
            "layers": layers,
            "output": self._output,
            "embedding": self._embedding,
            "overrides": [list(override) for override in self._overrides],
        }
        if self.kv_bytes_by_layer is not None:
            data["kv_bytes_by_layer"] = list(self.kv_bytes_by_layer)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], info: ModelInfo | None = None) -> Placement:
        """Return what :meth:`to_dict` was called on.

        Raises
        ------
        ValueError
            It is no placement, or one for another model than ``info``.
        """
        try:
            model = data["model"]
            n_layers = as_integer("n_layers", model["n_layers"], 0, 4096)
            tensors = _unfold_tensors(model["tensor_bytes"], n_layers)
            outline = _ModelOutline(str(model["architecture"]), str(model["name"]), n_layers, tensors)
            placement = cls(outline, data["devices"])
            missing = set(range(n_layers))
            for run in data["layers"]:
                layers = _parse_numbers("layers", run["layers"], n_layers)
                missing.difference_update(layers)
                for part in placement._shown_parts():
                    for layer in layers:
                        placement._parts[part][layer] = placement._device(run[part])
            if missing:
                raise ValueError(f"layers {_format_numbers(missing)} are missing")
            placement._output = placement._device(data["output"])
            placement._embedding = placement._device(data["embedding"])
            for pattern, device in data["overrides"]:
                placement.override(pattern, device)
            kv_bytes = data.get("kv_bytes_by_layer")
            placement.kv_bytes_by_layer = None if kv_bytes is None else [operator.index(n) for n in kv_bytes]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            detail = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"this is no placement: {detail}") from None
        if info is not None:
            placement.check(info)
        return placement

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str], info: ModelInfo | None = None) -> Placement:
        """Read one from a file.

        Raises
        ------
        ValueError
            It is no placement, or one for another model than ``info``.
        OSError
            The file cannot be read.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is no JSON: {error}") from None
        return cls.from_dict(data, info)

    # --- to look at

    def _shown_parts(self) -> list[LayerPart]:
        return [part for part in PARTS if part == "kv" or any(part in layer for layer in self._model.layers)]

    def _folded(self, key: Callable[[int], Any]) -> list[list[int]]:
        return [list(run) for _, run in groupby(range(self.n_layers), key)]

    def _cell(self, layers: Sequence[int], part: LayerPart) -> Cell:
        """Return the devices of a part of some layers, and the bytes there, if known."""
        if part == "kv":
            sizes = self.kv_bytes_by_layer
            return {self._parts["kv"][layers[0]]: None if sizes is None else sum(sizes[layer] for layer in layers)}
        tensors = self._devices_by_tensor()
        sizes_by_device: Counter[str] = Counter()
        for layer in layers:
            for name in self._model.layers[layer].get(part, ()):
                sizes_by_device[tensors[name]] += self._model.tensors[name]
        return {device: sizes_by_device[device] for device in self._devices if device in sizes_by_device}

    def _rows(self) -> list[tuple[str, list[Cell]]]:
        """Return runs of equal layers, each with a cell for every part."""
        tensors = self._devices_by_tensor()

        def places(layer: int) -> list[tuple[str, str]]:
            # By which tensors as well, so that what is mixed differently is not folded.
            names = {
                name.partition(f"blk.{layer}.")[2]: name for part in self._model.layers[layer].values() for name in part
            }
            mixed = any(getattr(self.layers[layer], part) == "mixed" for part in PARTS)
            if mixed:
                return [
                    ("kv", self._parts["kv"][layer]),
                    *((rest, tensors[name]) for rest, name in sorted(names.items())),
                ]
            return [(part, str(self._part_device(layer, part))) for part in PARTS]

        return [
            (_format_numbers(run), [self._cell(run, part) for part in self._shown_parts()])
            for run in self._folded(places)
        ]

    def _totals(self) -> list[tuple[str, Cell]]:
        """Return what comes below the layers: a label, and bytes by device."""

        def located(part: Part) -> Cell:
            sizes: Counter[str] = Counter()
            for name, device in self._devices_by_tensor().items():
                if self._model.parts[name] == part:
                    sizes[device] += self._model.tensors[name]
            if part == "output" and self._copied():
                sizes[self.output_matrix] += self._model.tensors["token_embd.weight"]
            return {device: sizes[device] for device in self._devices if device in sizes}

        label = "output (copy of embedding)" if self._copied() else "output"
        lines = [(label, located("output")), ("embedding", located("embedding")), ("other tensors", located("other"))]
        lines.append(("all weights", {device: n for device, n in self.bytes_by_device().items() if n}))
        if self.kv_bytes_by_layer is not None:
            caches: Counter[str] = Counter()
            for device, n_bytes in zip(self.kv, self.kv_bytes_by_layer, strict=True):
                caches[device] += n_bytes
            lines.append(("all KV caches", {device: caches[device] for device in self._devices if device in caches}))
        return [(label, sizes) for label, sizes in lines if sizes]

    def _content(self) -> PlacementTable:
        return PlacementTable(
            str(self._model), self._devices, self._shown_parts(), self._rows(), self._totals(), self._overrides
        )

    def __rich__(self) -> Group:
        return self._content().for_terminal()

    def __str__(self) -> str:
        """Return the table, 80 columns wide."""
        console = Console(file=io.StringIO(), width=80, color_system=None, force_terminal=False)
        with console.capture() as captured:
            console.print(self)
        return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())

    def _repr_html_(self) -> str:
        """Return a table for a notebook."""
        return self._content().as_html()


def _one(devices: Iterable[str]) -> str:
    distinct = set(devices)
    return distinct.pop() if len(distinct) == 1 else "mixed"
