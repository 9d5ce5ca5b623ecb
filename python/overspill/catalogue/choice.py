"""The best quantisation of a model that fits this machine, judged by the sizes of files."""

from __future__ import annotations

import re
from collections.abc import Mapping

from overspill._core import Error, devices
from overspill.base.host import available_ram_bytes
from overspill.base.units import format_bytes
from overspill.catalogue.model_files import quantisation_in

__all__ = ["best_fit", "free_bytes"]

# For the KV cache, buffers to compute in, and what a plan leaves free.
_BESIDE_WEIGHTS_BYTES = 2 << 30
_NOT_QUANTISED = ("F32", "F16", "BF16")
_USUAL = "Q4_K_M"
_FEWEST_BITS = 4  # below, models get noticeably worse


def best_fit(sizes: Mapping[str, int], gpu_bytes: int, all_bytes: int) -> tuple[str, str]:
    """Return the file to take, and the reason in words that go on a sentence.

    Of at least four bits, the largest that fits on the GPUs. If none does, the usual ``Q4_K_M`` or else the smallest
    of these that fits in all memory; and if none of four bits does, the largest that does. The only one there is, is
    taken whatever its size.

    Parameters
    ----------
    sizes
        Bytes of each model, by the name of its file. At least one.
    gpu_bytes, all_bytes
        Bytes that are free on the GPUs, and on them and in RAM together.

    Raises
    ------
    Error
        None fits.
    """
    if len(sizes) == 1:
        return next(iter(sizes)), "the only one"
    quantised = {name: size for name, size in sizes.items() if quantisation_in(name) not in _NOT_QUANTISED} or sizes
    by_size = sorted(quantised, key=lambda name: (quantised[name], name))
    good = [name for name in by_size if _bits(name) >= _FEWEST_BITS]
    if on_gpu := [name for name in good if quantised[name] + _BESIDE_WEIGHTS_BYTES <= gpu_bytes]:
        return on_gpu[-1], f"the largest that fits in the {format_bytes(gpu_bytes)} free on the GPU"
    fitting = [name for name in by_size if quantised[name] + _BESIDE_WEIGHTS_BYTES <= all_bytes]
    free = f"the {format_bytes(all_bytes)} of memory that are free"
    if usable := [name for name in fitting if name in good]:
        usual = [name for name in usable if quantisation_in(name) == _USUAL]
        return (usual or usable)[0], f"{'the usual one' if usual else 'the smallest good one'}, and it fits in {free}"
    if fitting:
        return fitting[-1], f"the largest that fits in {free}"
    least = by_size[0]
    raise Error(
        f"the smallest, {quantisation_in(least) or least}, has {format_bytes(quantised[least])} and does not fit in "
        f"{free}; name one to take it all the same"
    )


def _bits(name: str) -> int:
    found = re.search(r"\d+", quantisation_in(name))
    return int(found[0]) if found else _FEWEST_BITS


def free_bytes() -> tuple[int, int]:
    """Return the bytes that are free on the GPUs, and on them and in RAM together."""
    found = devices()
    gpu = sum(one.free_bytes for one in found if one.kind in ("gpu", "integrated_gpu"))
    own = sum(one.free_bytes for one in found if one.kind == "gpu")
    ram = available_ram_bytes() or sum(one.free_bytes for one in found if one.kind == "cpu")
    return gpu, own + ram
