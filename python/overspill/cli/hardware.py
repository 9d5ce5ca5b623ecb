"""Options for the hardware that a plan or a forecast is for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

import overspill
from overspill.base.units import parse_bytes
from overspill.cli.output import progress_bar
from overspill.machine.devices import add_rpc_servers

__all__ = ["GpuBandwidth", "Link", "Ram", "RamBandwidth", "UnpinnedLink", "Vram", "check_hardware", "hardware_of"]

Vram = Annotated[
    list[str] | None,
    typer.Option(help="Memory of a GPU, such as 24GiB; repeat it for several. Without --ram: of the GPUs here."),
]
Ram = Annotated[
    str | None,
    typer.Option(help="Memory of the host, such as 128GiB. With it, the plan is for hardware that is not here."),
]
GpuBandwidth = Annotated[
    list[str] | None, typer.Option(help="Memory bandwidth of each GPU, such as 936GB/s.", show_default="936GB/s")
]
RamBandwidth = Annotated[
    str | None, typer.Option(help="Memory bandwidth of the host, such as 47GB/s.", show_default="47GB/s")
]
Link = Annotated[
    list[str] | None, typer.Option(help="Bandwidth between host and GPU, such as 25GB/s.", show_default="25GB/s")
]
UnpinnedLink = Annotated[
    list[str] | None,
    typer.Option(
        help="The same for memory that is not pinned, such as a mapped file.", show_default="8.3GB/s, or --link"
    ),
]


def check_hardware(*, vram: list[str] | None, ram: str | None, **rates: str | list[str] | None) -> None:
    """Check what can be checked before a model is found; ``rates`` are the command's options for them."""
    for size in vram or ():
        parse_bytes("--vram", size)  # a missing unit is the likelier mistake than a missing GPU
    if ram is None and any(rates.values()):
        *names, last = (f"--{name.replace('_', '-')}" for name in rates)
        raise ValueError(f"{', '.join(names)} and {last} are of hardware that is not here: give --ram, too")


def hardware_of(
    header: overspill.ModelInfo,
    *,
    vram: list[str] | None,
    ram: str | None,
    gpu_bandwidth: list[str] | None,
    ram_bandwidth: str | None,
    link: list[str] | None,
    unpinned_link: list[str] | None,
    rpc: Sequence[str] = (),
) -> overspill.Hardware:
    """Return the hardware that is given, and was checked; without ``ram`` this machine, measured for the model."""
    if ram is not None:
        return overspill.Hardware.given(
            ram=ram,
            vram=vram or 0,
            gpu_bandwidth=gpu_bandwidth or None,
            ram_bandwidth=ram_bandwidth,
            link=link or None,
            unpinned_link=unpinned_link or None,
        )
    add_rpc_servers(rpc)
    gpus = [device for device in overspill.devices() if device.is_gpu]
    if len(vram or ()) > len(gpus):
        raise ValueError(
            f"--vram is given {len(vram or ())} times, and there are {len(gpus)} GPUs here; "
            "with --ram, too, it is planned for hardware that is not here"
        )
    memory = {gpu.name: size for gpu, size in zip(gpus, vram or (), strict=False)}
    with progress_bar("measuring") as show:
        return overspill.Hardware.here(
            header, memory=memory, progress=lambda what, share: show(f"measuring {what}", share)
        )
