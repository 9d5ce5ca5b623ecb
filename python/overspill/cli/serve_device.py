"""``overspill serve-device``: this machine's devices, offered to another one."""

from __future__ import annotations

from typing import Annotated

import typer

from overspill.cli.exits import INTERRUPTED, guarded_command
from overspill.cli.output import errors
from overspill.machine.rpc_server import serve

__all__ = ["serve_device"]


def serve_device(
    host: Annotated[str, typer.Option(help="The address to listen at, a name or IPv4.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen at.")] = 50052,
    n_threads: Annotated[
        int | None, typer.Option("--threads", "-t", min=1, max=512, help="CPU threads; default: physical cores.")
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="A device to offer; may be repeated. Default: the GPUs, or else the CPU.")
    ] = None,
) -> None:
    """Offer this machine's devices to `overspill run --rpc` on another one, until Ctrl-C.

    It serves one process at a time. Whoever reaches the port can use the devices and read the data: the protocol
    has no authentication and no encryption.
    """
    with guarded_command():
        try:
            serve(host, port, n_threads, device or (), lambda line: errors.print(line, soft_wrap=True))
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
