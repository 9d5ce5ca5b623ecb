"""The placement of a model: which device each of its parts is stored on and computed by."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from rich.console import Console, Group

from overspill.base.checks import as_instance, as_integer, as_list, as_mapping, as_text, naming, shown
from overspill.base.text import short_repr
from overspill.base.units import format_bytes
from overspill.header.info import ModelInfo
from overspill.placement import file, llama
from overspill.placement.assignment import Assignment, one_device
from overspill.placement.device_names import CPU, Devices, device_name, find_device, gpu_names, listed_devices
from overspill.placement.layer_numbers import Layers
from overspill.placement.layers import LayerSequence
from overspill.placement.llama import LlamaPlacement
from overspill.placement.memory_map import memory_map
from overspill.placement.outline import PARTS, ModelOutline
from overspill.placement.table import placement_table

__all__ = ["Placement"]


class Placement:
    """The device of each part of a model: a value that can be made, edited, shown, saved and loaded with.

    ===============  ==================================================================================
    ``attention``    of a layer: attention, or the recurrent parts in its place
    ``dense``        of a layer: feed-forward parts that every token passes through, and routers
    ``experts``      of a layer: experts, of which a token uses some
    ``kv``           of a layer: its KV cache, or the state that it keeps instead
    ``output``       the output head
    ``embedding``    the embedding
    ===============  ==================================================================================

    Devices go by llama.cpp's names, in any case; ``"gpu"`` is the first that is not the CPU. Two placements are equal
    if everything is on the same devices.

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
        The GPUs: their names, the list from :func:`overspill.devices`, or an object with ``devices``. The CPU may be
        left out.
    default
        The device of the layers, their KV cache and the output head. The embedding is on the CPU, where llama.cpp
        keeps it too: a token reads only one of its rows.

    Raises
    ------
    ValueError
        There is no such device, or a device is given twice.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, info: ModelInfo, devices: Devices = (), *, default: str = CPU) -> None:
        """Put everything on one device."""
        names = (*gpu_names(devices), CPU)
        with naming("default"):
            device = find_device(names, default)
        self._assignment = Assignment.on_one_device(ModelOutline.of(info), names, device)

    @staticmethod
    def _of(assignment: Assignment) -> Placement:
        placement = Placement.__new__(Placement)
        placement._assignment = assignment
        return placement

    # --- to make one

    @classmethod
    def cpu(cls, info: ModelInfo) -> Placement:
        """Return the placement that has everything on the CPU and uses no GPU."""
        return Placement(info)

    @classmethod
    def gpu(cls, info: ModelInfo, devices: Devices) -> Placement:
        """Return the placement that has all layers and the output head on GPUs; see :meth:`from_layers`."""
        return cls.from_layers(info, devices, as_instance("info", info, ModelInfo).n_layers + 1)

    @classmethod
    def from_layers(cls, info: ModelInfo, devices: Devices, n_gpu_layers: int) -> Placement:
        """Return a placement by whole layers, counted as llama.cpp counts them.

        Parameters
        ----------
        info
            The model.
        devices
            As for the class. Several GPUs share the layers in their order: in proportion to ``memory_bytes`` or
            ``free_bytes``, if they have it, else evenly.
        n_gpu_layers
            Layers on GPUs, 0 or more. The output head is the first, the last layers come next; a number above the
            model's means all.

        Raises
        ------
        ValueError
            The number is below 0, or there is no GPU.
        """
        devices = listed_devices(devices)
        placement = Placement(info, devices)
        n = min(as_integer("n_gpu_layers", n_gpu_layers, 0, 2**31 - 1), info.n_layers + 1)
        if n == 0:
            return placement
        gpus = [find_device(placement.devices, "gpu"), *placement.devices[1:-1]]
        by_name = {device_name(device): device for device in devices}
        sizes = [getattr(by_name[gpu], "memory_bytes", getattr(by_name[gpu], "free_bytes", 0)) for gpu in gpus]
        limits = [*accumulate(sizes if any(sizes) else [1] * len(gpus))]
        places = (next(i for i, limit in enumerate(limits) if limit * n > index * limits[-1]) for index in range(n))
        *on_gpus, output = (gpus[place] for place in places)
        layers = [*[CPU] * (info.n_layers - len(on_gpus)), *on_gpus]
        placement._assignment = replace(placement._assignment, parts=dict.fromkeys(PARTS, layers), output=output)
        return placement

    @classmethod
    def from_mapping(cls, info: ModelInfo, devices: Devices, mapping: Mapping[str, Any]) -> Placement:
        """Return the placement that :meth:`apply` makes of ``mapping``.

        Its key ``"default"`` is where to begin: ``"cpu"`` (if the key is missing), ``"gpu"`` (layers on all GPUs), the
        name of a device, or a number of layers as for :meth:`from_layers`.
        """
        rules = dict(as_mapping("mapping", mapping, "a mapping from parts to devices"))
        default = rules.pop("default", CPU)
        if isinstance(default, int) and not isinstance(default, bool):
            placement = cls.from_layers(info, devices, default)
        elif isinstance(default, str) and default.lower() == "gpu":
            placement = cls.gpu(info, devices)
        else:
            placement = Placement(info, devices, default=default)
        placement.apply(rules)
        return placement

    @classmethod
    def from_offload(cls, info: ModelInfo, devices: Devices, offload: str | int | Mapping[str, Any]) -> Placement:
        """Return the placement for ``"cpu"``, ``"gpu"``, a number of layers, or a mapping.

        Raises
        ------
        ValueError, TypeError
            ``offload`` is none of these, or names an unknown device, part or layer.
        """
        if isinstance(offload, Mapping):
            with naming("offload"):
                return cls.from_mapping(info, devices, offload)
        if (isinstance(offload, str) and offload in ("cpu", "gpu")) or (
            isinstance(offload, int) and not isinstance(offload, bool)
        ):
            with naming("offload"):
                return cls.from_mapping(info, devices, {"default": offload})
        raise ValueError(f'offload must be "cpu", "gpu", a number of layers or a mapping, not {shown(offload)}')

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], info: ModelInfo | None = None) -> Placement:
        """Return the placement that :meth:`to_dict` gave ``data`` for.

        Raises
        ------
        ValueError
            ``data`` is no placement, or one for another model than ``info``.
        """
        placement = cls._of(file.from_dict(data))
        if info is not None:
            placement.check(info)
        return placement

    @classmethod
    def load(cls, path: str | os.PathLike[str], info: ModelInfo | None = None) -> Placement:
        """Return the placement in a file.

        Raises
        ------
        ValueError
            The file holds no placement, or one for another model than ``info``.
        Error
            The file cannot be read.
        """
        placement = cls._of(file.read_file(path))
        if info is not None:
            placement.check(info)
        return placement

    def copy(self) -> Placement:
        """Return an equal placement, to edit."""
        return self._of(self._assignment)

    def read_back(self, tensors: Mapping[str, str], kv: Sequence[tuple[str, int]]) -> Placement:
        """Return the placement that llama.cpp really made of this one.

        Parameters
        ----------
        tensors
            The devices of tensors by name, as far as llama.cpp tells them. The others are as in this placement.
        kv
            Device and bytes of each layer's KV cache; empty if the model has none.
        """
        as_mapping("tensors", tensors, "a mapping from tensors to devices")
        devices = {name: as_text("tensors", device) for name, device in tensors.items()}
        caches = [_device_and_bytes(one) for one in as_list("kv", kv, "pairs of a device and bytes")]
        actual = self.copy()
        with naming("tensors"):
            actual._assignment = self._assignment.read_back(devices, caches)
        return actual

    # --- to ask

    @property
    def model_name(self) -> str:
        """The name of the model."""
        return self._assignment.model.name

    @property
    def fingerprint(self) -> str:
        """A hash of the model's architecture and of its tensors' names and bytes: 64 hexadecimal digits."""
        return self._assignment.model.fingerprint

    @property
    def n_layers(self) -> int:
        """Number of layers of the model."""
        return self._assignment.model.n_layers

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that may be used, the CPU last."""
        return self._assignment.devices

    @property
    def devices_used(self) -> tuple[str, ...]:
        """The devices that have a tensor, a KV cache or the output."""
        used = {*self._assignment.tensors.values(), *self.kv, self.output_matrix}
        return tuple(device for device in self.devices if device in used)

    @property
    def layers(self) -> LayerSequence:
        """The layers, to look at and to edit: ``placement.layers[10:20].experts = "cpu"``."""
        return LayerSequence(self)

    @property
    def kv(self) -> tuple[str, ...]:
        """The device of each layer's KV cache."""
        return tuple(self._assignment.kv)

    @property
    def kv_bytes_by_layer(self) -> Sequence[int] | None:
        """Bytes of each layer's KV cache, if known; only shown."""
        return self._assignment.kv_bytes_by_layer

    @kv_bytes_by_layer.setter
    def kv_bytes_by_layer(self, sizes: Sequence[int] | None) -> None:
        checked = None if sizes is None else file.checked_kv_bytes(sizes, self.n_layers)
        self._assignment = replace(self._assignment, kv_bytes_by_layer=checked)

    @property
    def expert_cache(self) -> Mapping[str, int]:
        """Bytes of GPUs, by device, for a cache of the experts that are on the CPU; empty: none.

        Experts that tokens have used are copied there, and computed there while the CPU computes the others.
        """
        return dict(self._assignment.expert_cache)

    @expert_cache.setter
    def expert_cache(self, pools: Mapping[str, int]) -> None:
        self._assignment = replace(self._assignment, expert_cache=file.checked_expert_cache(pools, self.devices))

    @property
    def output(self) -> str:
        """The device of the output head, or ``"mixed"``; of a tied embedding, the device of its copy."""
        return one_device([*self._assignment.devices_of("output"), self.output_matrix])

    @output.setter
    def output(self, device: str) -> None:
        with naming("output"):
            self.assign(part="output", device=device)

    @property
    def output_matrix(self) -> str:
        """The device of the matrix that makes logits; of a tied embedding, the device of its copy."""
        return self._assignment.output_matrix

    @property
    def embedding(self) -> str:
        """The device of the embedding, or ``"mixed"``."""
        return one_device(self._assignment.devices_of("embedding") or [self._assignment.embedding])

    @embedding.setter
    def embedding(self, device: str) -> None:
        with naming("embedding"):
            self.assign(part="embedding", device=device)

    @property
    def overrides(self) -> tuple[tuple[str, str], ...]:
        """Regular expressions over tensor names, and their devices. They go before the parts; later ones win."""
        return self._assignment.overrides

    def tensors(self) -> dict[str, str]:
        """Return the device of every tensor of the file, by name."""
        return dict(self._assignment.tensors)

    def device_of(self, tensor: str) -> str:
        """Return the device of the tensor of that name.

        Of a tied embedding it is the embedding's; its copy for the output is on :attr:`output`. A table that several
        layers share, such as rotary frequencies, is copied to each device with layers; it is the first layer's.

        Raises
        ------
        ValueError
            The model has no tensor of that name.
        """
        if as_text("tensor", tensor) not in self._assignment.tensors:
            raise ValueError(f"{self._assignment.model} has no tensor {shown(tensor)}")
        return self._assignment.tensors[tensor]

    def bytes_by_device(self) -> dict[str, int]:
        """Return the bytes of weights on each device that may be used, a copy of a tied embedding included."""
        return self._assignment.bytes_by_device()

    def check(self, info: ModelInfo, devices: Devices | None = None) -> None:
        """Raise a ValueError if this placement is for another model, or uses a device that is not in ``devices``."""
        other, model = ModelOutline.of(info), self._assignment.model
        if not other.same_model(model):
            differ = set(other.tensors.items()) ^ set(model.tensors.items())
            detail = f": they differ in {shown(min(differ)[0])}" if str(other) == str(model) and differ else ""
            raise ValueError(f"this placement is for {model}, not for {other}{detail}")
        if devices is not None:
            known = (*gpu_names(devices), CPU)
            for device in (*self.devices_used, *self.expert_cache):
                if device not in known:
                    raise ValueError(f"this placement uses {device}, but the devices here are {', '.join(known)}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return (
            self._assignment.model.same_model(other._assignment.model)
            and self.kv == other.kv
            and self.output_matrix == other.output_matrix
            and self._assignment.tensors == other._assignment.tensors
            and self.expert_cache == other.expert_cache
        )

    def _device_of_part(self, layer: int, part: str) -> str | None:
        return self._assignment.device_of_part(layer, part)

    # --- to edit

    def assign(self, *, part: str | Sequence[str], device: str, layers: Layers = None) -> None:
        """Put a part, or several, on a device.

        Parameters
        ----------
        part
            One or more of ``attention``, ``dense``, ``experts``, ``kv``; or ``output`` or ``embedding``, which belong
            to no layer.
        device
            The device's name, ``"cpu"`` or ``"gpu"``.
        layers
            A number, a slice, a range, or several numbers; negative ones count from the end. Default: all. Layers
            without the part are passed over, as long as one has it.

        Raises
        ------
        ValueError
            There is no such device, part or layer, or none of the layers has the part.
        """
        self._assignment = self._assignment.assigned(part, device, layers)

    def override(self, pattern: str, device: str | None) -> None:
        """Put the tensors whose names ``pattern`` finds on a device, whatever device their parts have.

        Parameters
        ----------
        pattern
            A regular expression, searched for in names as Python's ``re.search`` does. The last one that matches wins.
        device
            The device's name, ``"cpu"`` or ``"gpu"``; None removes the override.

        Raises
        ------
        ValueError
            It is no regular expression, matches no tensor, or there is no such device or no such override.
        """
        self._assignment = self._assignment.overridden(pattern, device)

    def apply(self, mapping: Mapping[str, Any]) -> None:
        """Make several edits in their order: all of them or, after an error, none.

        =============================  ==============================================================
        ``"experts"``, ``"output"``    a part
        ``"layers 0-9"``               all parts of layers; also ``"layers 0-3, 7"``
        ``"layers 0-9 experts"``       a part of layers
        ``"/ffn_down_exps/"``          the tensors whose names the regular expression finds
        =============================  ==============================================================

        Each value is a device; of layers it may be a mapping from parts to devices.

        >>> placement.apply({"experts": "cpu", "layers 30-35": "gpu", "layers 0-2": {"dense": "cpu", "kv": "cpu"}})

        Raises
        ------
        ValueError, TypeError
            As for :meth:`assign` and :meth:`override`, or a key has another form.
        """
        as_mapping("mapping", mapping, "a mapping from parts to devices")
        with naming("mapping"):
            self._assignment = self._assignment.applied(mapping)

    # --- for llama.cpp

    def llama_arguments(self) -> LlamaPlacement:
        """Return the arguments that make llama.cpp place everything so.

        llama.cpp gives each layer a device, which holds its KV cache. Any tensor may be moved from there; the KV cache
        may not. The first layers are the CPU's, then each GPU has one run of layers. The output head counts as the
        last layer.

        Raises
        ------
        ValueError
            llama.cpp cannot: the KV caches of the CPU's layers do not come first, those of a GPU are not in one run,
            or a tied embedding and its copy would have to be moved apart.
        """
        return llama.llama_arguments(self._assignment)

    def server_flags(self, *, buffer_types: Mapping[str, str] | None = None, **settings: Any) -> list[str]:
        """Return the flags that make ``llama-server`` place everything so.

        Parameters
        ----------
        buffer_types
            llama.cpp's names of buffer types, by device, where they differ from the device's: ``RPC0[host:port]``.
        **settings
            More flags by Overspill's names: ``n_ctx``, ``n_batch``, ``n_ubatch``, ``n_threads``, ``type_k``,
            ``type_v``, ``flash_attention``, ``load_mode``, and ``rpc`` (endpoints). None leaves a flag out.

        Raises
        ------
        ValueError
            llama.cpp cannot; see :meth:`llama_arguments`.
        TypeError
            There is no such setting.
        """
        types = (
            {} if buffer_types is None else as_mapping("buffer_types", buffer_types, "a mapping from devices to names")
        )
        for name in types.values():
            as_text("buffer_types", name)
        return llama.server_flags(self.llama_arguments(), types, settings)

    # --- for files and people

    def to_dict(self) -> dict[str, Any]:
        """Return the placement as a dict for JSON, with the identity of its model."""
        return file.to_dict(self._assignment)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the placement to a file, as JSON; an Error if it cannot be written."""
        file.write_file(path, self._assignment)

    def __rich__(self) -> Group:
        return placement_table(self._assignment).for_terminal()

    def _repr_html_(self) -> str:
        """Return the memory of each device and a table, for a notebook."""
        return memory_map(self._assignment) + placement_table(self._assignment).as_html()

    def __str__(self) -> str:
        """Return the table, 80 columns wide."""
        console = Console(file=io.StringIO(), width=80, color_system=None, force_terminal=False)
        with console.capture() as captured:
            console.print(self)
        return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())

    def __repr__(self) -> str:
        sizes = ", ".join(f"{device} {format_bytes(n)}" for device, n in self.bytes_by_device().items() if n)
        return short_repr(self, f"of {self._assignment.model}: {sizes}")


def _device_and_bytes(pair: object) -> tuple[str, int]:
    device, n_bytes = pair if isinstance(pair, tuple | list) and len(pair) == 2 else (None, 0)
    return as_text("kv", device), as_integer("kv", n_bytes, 0, 2**63 - 1)
