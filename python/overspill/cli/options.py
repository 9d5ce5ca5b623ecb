"""Options of several commands, and functions that read their text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from overspill.placement.placement import Placement
from overspill.planning.offload import Offload

__all__ = [
    "MIN_P",
    "TEMPERATURE",
    "TOP_K",
    "TOP_P",
    "Batch",
    "Context",
    "DeviceMemory",
    "ExpertsAt",
    "Json",
    "Loading",
    "MinP",
    "ModelFile",
    "OffloadTo",
    "RepeatPenalty",
    "Seed",
    "Servers",
    "Temperature",
    "Threads",
    "TopK",
    "TopP",
    "Verbose",
    "check_writable",
    "only_given",
    "parse_offload",
    "parse_pair",
    "parse_sizes",
]

ModelFile = Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file, or a name as overspill list shows.")]

TEMPERATURE = "0: always the most likely token."
TOP_K = "Keep so many of the most likely tokens; 0: all."
TOP_P = "Keep the likeliest tokens up to this probability; 1: all."
MIN_P = "Drop tokens below this share of the likeliest; 0: none."
Temperature = Annotated[
    float | None,
    typer.Option("--temp", "--temperature", help=TEMPERATURE, show_default="the file's, or 0.8"),
]
TopK = Annotated[int | None, typer.Option(help=TOP_K, show_default="the file's, or 40")]
TopP = Annotated[
    float | None,
    typer.Option(help=TOP_P, show_default="the file's, or 0.95"),
]
MinP = Annotated[
    float | None,
    typer.Option(help=MIN_P, show_default="the file's, or 0.05"),
]
RepeatPenalty = Annotated[
    float | None,
    typer.Option(help="Divide the logits of the last 64 tokens by this; 1: off.", show_default="the file's, or 1.0"),
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]

Context = Annotated[int | None, typer.Option("--ctx", "--ctx-size", "-c", help="Tokens of prompt and reply together.")]
ExpertsAt = Annotated[
    str | None,
    typer.Option(
        "--experts",
        metavar="auto|static|cached",
        help="Experts in RAM: static, there; cached, and those used lately on the GPUs as well.",
        show_default="auto",
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", "-t", help="CPU threads; default: physical cores.")]
Batch = Annotated[
    int | None,
    typer.Option(
        "--batch",
        "--batch-size",
        "-b",
        help="Tokens of the prompt processed at once.",
        show_default="as planned, or 512",
    ),
]
OffloadTo = Annotated[
    str,
    typer.Option(
        help="Placement of the weights: auto, cpu, gpu, tuned, a number of layers for the GPU, or a file of overspill "
        "plan --save."
    ),
]
Loading = Annotated[
    str | None,
    typer.Option(help="How the file is loaded: mmap, read, mlock, mmap+mlock or direct-io.", show_default="mmap"),
]
Servers = Annotated[
    list[str] | None,
    typer.Option(metavar="HOST:PORT", help="Use the devices of overspill serve-device there; may be repeated."),
]
DeviceMemory = Annotated[
    list[str] | None,
    typer.Option(metavar="DEVICE=SIZE", help="Most memory to use of a device, as in gpu=20GiB; may be repeated."),
]

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show llama.cpp's log, and where an error comes from.")]


def only_given(**options: Any) -> dict[str, Any]:
    """Return the options that are given; for the others, the file, its tuned settings or a default decides."""
    return {name: value for name, value in options.items() if value is not None}


def parse_offload(text: str) -> Offload:
    """Return the placement in a ``.json`` file, a number of layers, or the word itself."""
    if text.endswith(".json"):
        return Placement.load(text)
    return int(text) if text.isdecimal() else cast(Offload, text)


def parse_sizes(memory: list[str] | None) -> dict[str, str]:
    """Return the size of each device that ``--memory`` names."""
    return dict(parse_pair("--memory", "DEVICE=SIZE, such as gpu=20GiB", text) for text in memory or ())


def parse_pair(option: str, form: str, text: str) -> tuple[str, str]:
    """Return the two sides of the last ``=``; an error describes them by ``form``."""
    # A pin may be a regular expression with a sign of its own.
    key, equals, value = text.rpartition("=")
    if not (key and equals and value):
        raise ValueError(f"{option} must be {form}, not {text!r}")
    return key, value


def check_writable(file: Path) -> None:
    """Raise OSError if ``file`` cannot be written, before much time is spent on its content."""
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder; give a file in it, such as {file / 'report.html'}")
    if not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise OSError(f"{file} cannot be written: its folder is missing, or not yours to write to")
