"""The layers of a placement, to look at and to edit: ``placement.layers[10:20].experts = "cpu"``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, SupportsIndex, overload

from overspill.placement.layer_numbers import Layers, format_numbers, selected_layers
from overspill.placement.outline import PARTS

__all__ = ["Layer", "LayerRange", "LayerSequence"]


class _HasLayers(Protocol):
    """A placement, as far as its layers need it."""

    @property
    def n_layers(self) -> int: ...
    def assign(self, *, part: str, device: str, layers: Layers) -> None: ...
    def _device_of_part(self, layer: int, part: str) -> str | None: ...


class _LayerPart:
    """A part of one layer, as an attribute."""

    def __set_name__(self, _owner: type, name: str) -> None:
        self._part = name

    def __get__(self, layer: Layer, _owner: type) -> str | None:
        return layer._placement._device_of_part(layer._index, self._part)

    def __set__(self, layer: Layer, device: str) -> None:
        layer._placement.assign(layers=layer._index, part=self._part, device=device)


class _LayersPart:
    """A part of several layers, as an attribute."""

    def __set_name__(self, _owner: type, name: str) -> None:
        self._part = name

    def __get__(self, layers: LayerRange, _owner: type) -> tuple[str | None, ...]:
        return tuple(layers._placement._device_of_part(layer, self._part) for layer in layers._indices)

    def __set__(self, layers: LayerRange, device: str) -> None:
        layers._placement.assign(layers=layers._indices, part=self._part, device=device)


class Layer:
    """The parts of one layer: a device, ``"mixed"``, or None for a missing part. Assign a device to move a part."""

    __slots__ = ("_index", "_placement")
    attention = _LayerPart()
    dense = _LayerPart()
    experts = _LayerPart()
    kv = _LayerPart()

    def __init__(self, placement: _HasLayers, index: int) -> None:
        """Look at one layer; ``placement.layers[i]`` makes these."""
        self._placement, self._index = placement, index

    def __repr__(self) -> str:
        return f"<layer {self._index}: " + ", ".join(f"{part} {getattr(self, part)}" for part in PARTS) + ">"


class LayerRange:
    """The parts of several layers, as tuples. Assign a device to move a part of all layers that have it."""

    __slots__ = ("_indices", "_placement")
    attention = _LayersPart()
    dense = _LayersPart()
    experts = _LayersPart()
    kv = _LayersPart()

    def __init__(self, placement: _HasLayers, indices: Sequence[int]) -> None:
        """Look at several layers; ``placement.layers[i:j]`` makes these."""
        self._placement, self._indices = placement, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Layer]:
        return (Layer(self._placement, index) for index in self._indices)

    def __repr__(self) -> str:
        return f"<layers {format_numbers(self._indices)}>"


class LayerSequence:
    """The layers of a placement: take one, or a slice."""

    __slots__ = ("_placement",)

    def __init__(self, placement: _HasLayers) -> None:
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
        indices = selected_layers(index, len(self))
        return LayerRange(self._placement, indices) if isinstance(index, slice) else Layer(self._placement, indices[0])
