"""The content of a placement, as a value: the device of each part of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from overspill.base.cached import cached_property
from overspill.base.checks import as_list, as_text, shown
from overspill.header.tensor_names import Part
from overspill.placement.device_names import CPU, find_device
from overspill.placement.layer_numbers import Layers, format_numbers, selected_layers
from overspill.placement.outline import PARTS, LayerPart, ModelOutline
from overspill.placement.rules import mapping_rules

__all__ = ["Assignment", "one_device"]


@dataclass(frozen=True, eq=False)
class Assignment:
    """The device of each part of a model. It never changes: an edit returns another assignment."""

    model: ModelOutline
    devices: tuple[str, ...]
    """The devices that may be used, the CPU last."""
    parts: Mapping[LayerPart, Sequence[str]]
    """For each of :data:`PARTS`, the device of each layer."""
    output: str
    """The device of the output head, where no override says otherwise."""
    embedding: str
    """The device of the embedding, where no override says otherwise."""
    overrides: tuple[tuple[str, str], ...] = ()
    """Regular expressions over the names of tensors, and their devices. They go before the parts; later ones win."""
    kv_bytes_by_layer: Sequence[int] | None = None
    """Bytes of the KV cache of each layer, if known; only shown."""
    expert_cache: Mapping[str, int] = field(default_factory=dict)
    """Bytes on GPUs for a cache of the experts that are on the CPU, by device."""

    @classmethod
    def on_one_device(cls, model: ModelOutline, devices: tuple[str, ...], device: str) -> Assignment:
        """Return the assignment of everything to one device, but for the embedding, which is on the CPU."""
        return cls(model, devices, dict.fromkeys(PARTS, (device,) * model.n_layers), device, CPU)

    # --- queries

    @cached_property
    def tensors(self) -> dict[str, str]:
        """The device of each tensor, by the tensor's name."""
        compiled = [(re.compile(pattern), device) for pattern, device in reversed(self.overrides)]
        if not compiled:
            return {name: self._device_by_part(name) for name in self.model.tensors}
        return {
            name: next((device for pattern, device in compiled if pattern.search(name)), self._device_by_part(name))
            for name in self.model.tensors
        }

    @property
    def kv(self) -> Sequence[str]:
        """The device of the KV cache of each layer."""
        return self.parts["kv"]

    @property
    def output_matrix(self) -> str:
        """The device of the matrix that makes logits; of a tied embedding, the device of its copy."""
        if not self.model.tied:
            return self.tensors.get("output.weight", self.output)
        # An override moves the embedding and its copy alike.
        overridden = any(re.search(pattern, "token_embd.weight") for pattern, _ in self.overrides)
        return self.tensors["token_embd.weight"] if overridden else self.output

    @property
    def copies_embedding(self) -> bool:
        """Whether a tied embedding has a copy for the output on another device."""
        return self.model.tied and self.output_matrix != self.tensors["token_embd.weight"]

    def device_of_part(self, layer: int, part: str) -> str | None:
        """Return the device of a part of a layer, ``"mixed"``, or None if the layer lacks the part."""
        if part == "kv":
            return self.kv[layer]
        names = self.model.layers[layer].get(part)
        return one_device(self.tensors[name] for name in names) if names else None

    def devices_of(self, part: Part) -> list[str]:
        """Return the devices of the tensors of a part of the model."""
        return [device for name, device in self.tensors.items() if self.model.parts[name] == part]

    def bytes_by_device(self) -> dict[str, int]:
        """Return the bytes of weights on each device, a copy of the embedding included."""
        sizes = dict.fromkeys(self.devices, 0)
        for name, device in self.tensors.items():
            sizes[device] += self.model.tensors[name]
        if self.copies_embedding:
            sizes[self.output_matrix] += self.model.tensors["token_embd.weight"]
        return sizes

    def _device_by_part(self, name: str) -> str:
        """Return the device of a tensor without regard to overrides."""
        part, layer = self.model.parts[name], self.model.layer_of[name]
        if layer is not None:
            return self.parts[part if part in ("attention", "dense", "experts") else "kv"][layer]
        if part == "embedding":
            return self.embedding
        if part == "output" or self.model.with_output(name):
            return self.output
        return self.kv[0] if self.model.n_layers else CPU

    # --- edits

    def assigned(self, part: str | Sequence[str], device: str, layers: Layers) -> Assignment:
        """Return another assignment, with parts on a device; see :meth:`overspill.Placement.assign`."""
        device = find_device(self.devices, device)
        wanted = [part] if isinstance(part, str) else as_list("part", part, "names of parts")
        indices = selected_layers(layers, self.model.n_layers)
        for one in wanted:
            as_text("part", one)
            if one in ("output", "embedding"):
                if layers is not None:
                    raise ValueError(f"{one} belongs to no layer: leave layers out")
            elif one not in PARTS:
                raise ValueError(f"part must be one of {', '.join(PARTS)}, output or embedding, not {shown(one)}")
            elif one != "kv" and not any(one in self.model.layers[layer] for layer in indices):
                where = "it has" if layers is None else f"layers {format_numbers(indices)} have"
                raise ValueError(f"{self.model}: {where} no {one}")
        chosen = set(indices)
        parts = {
            one: [device if layer in chosen else before for layer, before in enumerate(devices)]
            if one in wanted
            else devices
            for one, devices in self.parts.items()
        }
        output = device if "output" in wanted else self.output
        embedding = device if "embedding" in wanted else self.embedding
        return replace(self, parts=parts, output=output, embedding=embedding)

    def overridden(self, pattern: str, device: str | None) -> Assignment:
        """Return another assignment, with an override or without it; see :meth:`overspill.Placement.override`."""
        as_text("pattern", pattern)
        kept = tuple(override for override in self.overrides if override[0] != pattern)
        if device is None:
            if len(kept) == len(self.overrides):
                raise ValueError(f"pattern: there is no override {shown(pattern)}")
            return replace(self, overrides=kept)
        try:
            matches = any(map(re.compile(pattern).search, self.model.tensors))
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"pattern: {shown(pattern)} is no regular expression: {error}") from None
        if not matches:
            raise ValueError(f"pattern: {shown(pattern)} matches no tensor of {self.model}")
        return replace(self, overrides=(*kept, (pattern, find_device(self.devices, device))))

    def applied(self, mapping: Mapping[str, Any]) -> Assignment:
        """Return another assignment, with the rules of a mapping; see :meth:`overspill.Placement.apply`."""
        edited = self
        for rule in mapping_rules(mapping, self.model.n_layers):
            if rule.pattern is not None:
                edited = edited.overridden(rule.pattern, rule.device)
                continue
            parts: Sequence[str] = rule.parts
            if parts == PARTS:
                # Layers without a part are passed over here, even if none of them has it.
                chosen = selected_layers(rule.layers, self.model.n_layers)
                found = {"kv", *chain.from_iterable(self.model.layers[layer] for layer in chosen)}
                parts = [part for part in PARTS if part in found]
            edited = edited.assigned(parts, rule.device, rule.layers)
        return edited

    def read_back(self, tensors: Mapping[str, str], kv: Sequence[tuple[str, int]]) -> Assignment:
        """Return another assignment, with everything where it really is; see :meth:`overspill.Placement.read_back`."""
        actual = self
        if len(kv) == self.model.n_layers:
            parts = {**self.parts, "kv": [device for device, _ in kv]}
            actual = replace(self, parts=parts, kv_bytes_by_layer=[n_bytes for _, n_bytes in kv])
        more = sorted({*tensors.values(), CPU} - set(self.devices))
        actual = replace(actual, devices=(*self.devices[:-1], *more, CPU))
        elsewhere = {name: device for name, device in tensors.items() if actual.tensors.get(name, device) != device}
        if self.model.tied and elsewhere.get("token_embd.weight") == actual.output_matrix:
            del elsewhere["token_embd.weight"]  # the copy, not the embedding itself
        for name, device in elsewhere.items():
            actual = actual.overridden(f"^{re.escape(name)}$", device)
        return actual


def one_device(devices: Iterable[str]) -> str:
    """Return the device that all of ``devices`` are, or ``"mixed"``."""
    distinct = set(devices)
    return distinct.pop() if len(distinct) == 1 else "mixed"
