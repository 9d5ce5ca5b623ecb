"""Options of several commands, and functions that read their text."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import wraps
from glob import escape, glob
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, cast, get_type_hints

import typer

from overspill.catalogue.disk import models_on_disk
from overspill.catalogue.model_files import is_gguf
from overspill.header.info import ModelInfo
from overspill.header.overrides import MetadataValue
from overspill.placement.placement import Placement
from overspill.planning.offload import Offload

__all__ = [
    "MAX_TOKENS",
    "MIN_P",
    "MODEL",
    "OFFLOAD",
    "TEMPERATURE",
    "TOP_K",
    "TOP_P",
    "Effort",
    "Json",
    "LoadOptions",
    "Loading",
    "MaxTokens",
    "MinP",
    "ModelFile",
    "RepeatPenalty",
    "Seed",
    "System",
    "Temperature",
    "Threads",
    "TopK",
    "TopP",
    "Verbose",
    "check_writable",
    "complete_model",
    "loads_a_model",
    "only_given",
    "parse_offload",
    "parse_pair",
    "with_option_names",
]


def complete_model(incomplete: str) -> list[str]:
    """Return what a shell may complete to a model: names as ``overspill list`` shows them, files and folders."""
    names = [model.name for model in models_on_disk() if model.name.startswith(incomplete)]
    for text in glob(f"{escape(incomplete)}*"):  # noqa: PTH207  # which keeps a ./ as it was typed
        is_folder = Path(text).is_dir()
        names += [f"{text}/" if is_folder else text] if is_folder or is_gguf(text) else []
    return [*dict.fromkeys(names)]


MODEL = "A GGUF file, or a name as overspill list shows."
ModelFile = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL, autocompletion=complete_model)]

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
Seed = Annotated[int | None, typer.Option("--seed", "-s", help="The same seed gives the same text.")]

MAX_TOKENS = ("--max-tokens", "--predict", "--n-predict", "-n")
MaxTokens = Annotated[
    int, typer.Option(*MAX_TOKENS, help="Tokens of the reply; 0: until the model or the context ends.")
]
System = Annotated[
    str | None,
    typer.Option("--system", "--system-prompt", "-sys", help="The system prompt, for models with a chat template."),
]

Effort = Annotated[
    str | None,
    typer.Option(
        "--effort",
        "--reasoning-effort",
        help="Reasoning effort, for models that know it, such as gpt-oss: low, medium or high.",
    ),
]
Context = Annotated[int | None, typer.Option("--ctx", "--ctx-size", "-c", help="Tokens of prompt and reply together.")]
Parallel = Annotated[
    int | None,
    typer.Option("--parallel", "-np", help="Streams that are decoded together, each with a KV cache of its own."),
]
PromptCache = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="RAM for what prompts have in common with those that lost their place, as in 2GiB.",
        show_default="none",
    ),
]
ExpertsAt = Annotated[
    str | None,
    typer.Option(
        "--experts",
        metavar="auto|static|cached",
        help="Experts in RAM: static, there; cached, and those used lately on the GPUs as well.",
        show_default="auto",
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", help="CPU threads; fewer decode while other programs have their cores.")
]
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
UBatch = Annotated[
    int | None,
    typer.Option(
        "--ubatch",
        "--ubatch-size",
        "-ub",
        help="Tokens of a batch computed at once.",
        show_default="as planned, or --batch",
    ),
]
OFFLOAD = ("--offload", "--gpu-layers", "--n-gpu-layers", "-ngl")
OffloadTo = Annotated[
    str | None,
    typer.Option(
        *OFFLOAD,
        help="Placement of the weights: auto, cpu, gpu (or all), tuned, a number of layers for the GPU, or a file of "
        "overspill plan --save.",
        show_default="auto",
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
TypeK = Annotated[
    str | None,
    typer.Option(
        "--type-k", "--cache-type-k", "-ctk", help="Type of the KV cache's keys, such as q8_0.", show_default="f16"
    ),
]
TypeV = Annotated[
    str | None,
    typer.Option("--type-v", "--cache-type-v", "-ctv", help="Type of the KV cache's values.", show_default="f16"),
]
FlashAttention = Annotated[
    str | None,
    typer.Option(
        "--flash-attention",
        "--flash-attn",
        "-fa",
        metavar="auto|on|off",
        help="Needed by quantized values of the KV cache.",
        show_default="auto",
    ),
]
Override = Annotated[
    list[str] | None,
    typer.Option(
        "--override",
        "--override-kv",
        metavar="KEY=VALUE",
        help="A value of the file's header in place of its own, as in llama.rope.freq_base=1e6; may be repeated.",
    ),
]


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded: one list for all commands that load one. None stands for what is not given."""

    offload: OffloadTo = None
    experts: ExpertsAt = None
    memory: DeviceMemory = None
    n_ctx: Context = None
    n_parallel: Parallel = None
    prompt_cache: PromptCache = None
    n_batch: Batch = None
    n_ubatch: UBatch = None
    n_threads: Threads = None
    type_k: TypeK = None
    type_v: TypeV = None
    flash_attention: FlashAttention = None
    load_mode: Loading = None
    rpc: Servers = None
    override: Override = None

    def given(self) -> dict[str, Any]:
        """Return what is given, as :class:`overspill.Model` has it, without the overrides."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        del named["override"]
        named["offload"] = None if self.offload is None else parse_offload(self.offload)
        named["memory"] = parse_sizes(self.memory) or None
        return only_given(**named)

    def model(self, path: str | os.PathLike[str]) -> ModelInfo:
        """Return a file's header, with the values that the command line puts into it."""
        info = ModelInfo.from_file(path)
        return info.with_overrides(parse_overrides(info, self.override)) if self.override else info


def loads_a_model(*, without: Collection[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of :class:`LoadOptions`, in place of its parameter ``loading``.

    ``without`` are fields that it decides itself.
    """
    hints = get_type_hints(LoadOptions, include_extras=True)
    added = [
        Parameter(field.name, Parameter.POSITIONAL_OR_KEYWORD, default=field.default, annotation=hints[field.name])
        for field in fields(LoadOptions)
        if field.name not in without
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            loading = LoadOptions(**{one.name: given.pop(one.name) for one in added})
            command(**given, loading=loading)

        own = get_type_hints(command, include_extras=True)
        listed: list[Parameter] = []
        for one in signature(command).parameters.values():
            listed += added if one.name == "loading" else [one.replace(annotation=own[one.name])]
        # typer reads both.
        run.__signature__ = Signature(listed)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in listed}
        return run

    return decorate


def _names_of_options() -> dict[str, str]:
    """Return what the command line calls arguments of Python."""
    hints = get_type_hints(LoadOptions, include_extras=True)
    hints["overrides"] = hints.pop("override")
    hints |= {"temperature": Temperature, "top_k": TopK, "top_p": TopP, "min_p": MinP, "repeat_penalty": RepeatPenalty}
    hints |= {"max_tokens": MaxTokens, "seed": Seed}
    names = dict.fromkeys(("json_schema", "prompt_tokens", "reply_tokens", "n_prompt", "n_gen", "n_depth"), "")
    for name, hint in hints.items():
        option = hint.__metadata__[0]
        given = (option.default, *(option.param_decls or ()))
        names[name] = next((one for one in given if isinstance(one, str)), "")
    names["allow_kv_types"] = "--kv-type"
    return {name: option or f"--{name.replace('_', '-')}" for name, option in names.items()}


_OPTIONS = _names_of_options()
_NAMES = "|".join(_OPTIONS)
# An argument with a value; one that no word of English is spelled like; and any that a message begins with.
_WITH_VALUE = re.compile(rf'(?<![\w.-])({_NAMES})=("[^"]*"|[^\s,;:)]+)')
# Not in a path or in quotes, which are the user's.
_IN_TEXT = re.compile(rf"(?<![\w./'\"-])({'|'.join(name for name in _OPTIONS if '_' in name)})(?![\w(.=/'\"])")
_FIRST = re.compile(rf"^({_NAMES})(?=: | must |\[)")


def with_option_names(text: str) -> str:
    """Return a message of Python with the options of the command line in place of arguments, and its commands."""
    text = _WITH_VALUE.sub(lambda found: f"{_OPTIONS[found[1]]} {found[2].strip(chr(34))}", text)
    for pattern in (_IN_TEXT, _FIRST):
        text = pattern.sub(lambda found: _OPTIONS[found[1]], text)
    return text.replace("overspill.devices()", "overspill devices")


Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show llama.cpp's log, and where an error comes from.")]


def only_given(**options: Any) -> dict[str, Any]:
    """Return the options that are given; for the others, the file, its tuned settings or a default decides."""
    return {name: value for name, value in options.items() if value is not None}


def parse_offload(text: str) -> Offload:
    """Return the placement in a ``.json`` file, a number of layers, or the word itself."""
    if text.endswith(".json"):
        return Placement.load(text)
    if text == "all":
        return "gpu"
    return int(text) if text.isdecimal() else cast(Offload, text)


def parse_sizes(memory: list[str] | None) -> dict[str, str]:
    """Return the size of each device that ``--memory`` names."""
    return dict(parse_pair("--memory", "DEVICE=SIZE, such as gpu=20GiB", text) for text in memory or ())


def parse_overrides(info: ModelInfo, given: list[str] | None) -> dict[str, MetadataValue]:
    """Return the values that ``--override`` names, as the header's types are; llama.cpp's ``TYPE:`` may be there."""
    found: dict[str, MetadataValue] = {}
    for text in given or ():
        key, _, value = text.partition("=")
        if not (key and value):
            raise ValueError(f"--override must be KEY=VALUE, such as llama.rope.freq_base=1e6, not {text!r}")
        kind, colon, rest = value.partition(":")
        if colon and kind in ("int", "float", "bool", "str"):
            value = rest
        found[key] = value
        if not isinstance(info.metadata.get(key), str) and kind != "str":
            with suppress(ValueError, RecursionError):  # a text then
                number = json.loads(value)
                found[key] = number if isinstance(number, bool | int | float) else value
    return found


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
