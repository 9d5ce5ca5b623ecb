"""The memory of a GPU, or of its stand-in: how much is free, and what happens if little is."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

import overspill
from gpu_visibility import SIZE, TOOLS
from overspill.base.units import parse_bytes
from upstream_tools import stand_in_gpu


def device_named(name: str) -> overspill.Device:
    """Return what is to be said about a device now."""
    return next(device for device in overspill.devices() if device.name == name)


@pytest.fixture
def device_now(gpu: str) -> Callable[[], overspill.Device]:
    """Return a function that returns the GPU with its free memory."""
    return lambda: device_named(gpu)


@contextmanager
def _stand_in_with(free_bytes: int, device: overspill.Device) -> Iterator[None]:
    tools, size = Path(os.environ[TOOLS]), parse_bytes(SIZE, os.environ[SIZE])
    used_bytes = device.total_bytes - device.free_bytes
    stand_in_gpu(tools, device.name, size, refuse_bytes=used_bytes + free_bytes)
    try:
        yield
    finally:
        stand_in_gpu(tools, device.name, size)


@contextmanager
def _cuda_with(free_bytes: int, device: overspill.Device) -> Iterator[None]:
    # The library that CUDA's backend has loaded, and the device that is current in this thread by default, the first.
    runtime = ctypes.CDLL("libcudart.so.13")
    taken = []
    chunk_bytes = device.free_bytes
    try:
        while chunk_bytes >= free_bytes:
            address = ctypes.c_void_p()
            if runtime.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(chunk_bytes)) == 0:
                taken.append(address)
            else:
                runtime.cudaGetLastError()  # forgets it: llama.cpp would take it for its own
                chunk_bytes //= 2
        yield
    finally:
        for address in taken:
            runtime.cudaFree(address)


@pytest.fixture
def scarce_memory(gpu: str) -> Callable[[int], AbstractContextManager[None]]:
    """Return a function that leaves the GPU about so many bytes for a block, as another program would."""
    device = device_named(gpu)
    if device.backend == "StandIn":
        return lambda free_bytes: _stand_in_with(free_bytes, device_named(gpu))
    if device.backend != "CUDA" or gpu != "CUDA0":
        pytest.skip(f"how to take memory from {gpu} is not known here")
    return lambda free_bytes: _cuda_with(free_bytes, device_named(gpu))
