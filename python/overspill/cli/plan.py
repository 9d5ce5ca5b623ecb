"""``overspill plan``: the best placement of a model, and the speed to expect of it."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

import overspill
from overspill.base.tables import plain_table
from overspill.base.units import format_bytes
from overspill.cli.exits import guarded_command
from overspill.cli.hardware import (
    GpuBandwidth,
    Link,
    Ram,
    RamBandwidth,
    UnpinnedLink,
    Vram,
    check_hardware,
    hardware_of,
)
from overspill.cli.options import Json, LoadOptions, ModelFile, loads_a_model, parse_pair
from overspill.cli.output import report_output
from overspill.planning.plan import prompt_line
from overspill.planning.settings import PROMPT_TOKENS, REPLY_TOKENS
from overspill.planning.ubatch import trade_around

__all__ = ["plan"]


# A plan decides the others.
@loads_a_model(without=["offload", "memory", "n_batch", "n_threads", "flash_attention", "load_mode", "prompt_cache"])
def plan(
    model: ModelFile,
    vram: Vram = None,
    ram: Ram = None,
    gpu_bandwidth: GpuBandwidth = None,
    ram_bandwidth: RamBandwidth = None,
    link: Link = None,
    unpinned_link: UnpinnedLink = None,
    depth: Annotated[
        int | None, typer.Option(help="Tokens in the context while it decodes.", show_default="half of --ctx")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt of an exchange.")] = PROMPT_TOKENS,
    reply_tokens: Annotated[int, typer.Option(help="Tokens of its reply.")] = REPLY_TOKENS,
    pin: Annotated[
        list[str] | None,
        typer.Option(
            help='Place a part by hand, such as "experts=cpu" or "layers 0-9 attention=gpu"; may be repeated.'
        ),
    ] = None,
    *,
    loading: LoadOptions,
    save: Annotated[
        Path | None, typer.Option(help="Write the placement to a file, for overspill run --offload.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Plan which part of MODEL goes to which device, with the speed to expect and the reason; nothing is loaded."""
    with guarded_command():
        given: dict[str, Any] = {
            "vram": vram,
            "ram": ram,
            "gpu_bandwidth": gpu_bandwidth,
            "ram_bandwidth": ram_bandwidth,
            "link": link,
            "unpinned_link": unpinned_link,
        }
        check_hardware(**given)
        header = loading.model(model)
        hardware = hardware_of(header, **given, rpc=loading.rpc or ())
        settings: dict[str, Any] = {
            "depth": depth,
            "prompt_tokens": prompt_tokens,
            "reply_tokens": reply_tokens,
            **replace(loading, rpc=None).given(),
        }
        pins = dict(parse_pair("--pin", 'like "experts=cpu"', text) for text in pin or ())
        planned = overspill.plan(header, hardware=hardware, pins=pins, **settings)
        if save is not None:
            planned.save(save)
        if as_json:
            print(json.dumps(_data(planned), indent=2))
        else:
            _print_plan(planned)


def _data(planned: overspill.Plan) -> dict[str, Any]:
    return {
        "forecast": planned.forecast().to_dict(),
        "whole_layers_tokens_per_s": planned.whole_layers_tokens_per_s,
        "hardware": planned.hardware.to_dict(),
        "placement": planned.to_dict(),
        "ubatch_trade": [
            asdict(trade) | {"prefill_ceiling_tokens_per_s": _or_none(trade.prefill_ceiling_tokens_per_s)}
            for trade in trade_around(planned)
        ],
        "llama_server_flags": _server_flags(planned),
    }


def _server_flags(planned: overspill.Plan) -> list[str]:
    planned = planned.static() if planned.expert_cache else planned  # llama-server has no cache of experts
    used = planned.forecast().settings
    # llama-server's batches have 2048 tokens at most unless it is told otherwise.
    batches = {"n_batch": used.n_ubatch, "n_ubatch": used.n_ubatch}
    more: dict[str, Any] = {"n_ctx": used.n_ctx, **batches, "type_k": used.type_k, "type_v": used.type_v}
    return planned.server_flags(**more)


def _print_plan(planned: overspill.Plan) -> None:
    expected = planned.forecast()
    output = report_output()
    output.print(f"{expected.verdict}: about {expected.tokens_per_s:.1f} tokens/s", style="bold")
    output.print(prompt_line(expected), style="bold")
    output.print(expected.reason)
    if expected.weights_in_ram:
        output.print(expected.weights_in_ram)
    if planned.whole_layers_tokens_per_s:
        output.print(f"The best split by whole layers: {planned.whole_layers_tokens_per_s:.1f} tokens/s.")
    for remedy in expected.remedies:
        output.print(f"- {remedy}")
    output.print()
    output.print(overspill.Placement.__rich__(planned))
    memory = plain_table("device", "weights", "KV cache", "computing", "left free", "of", "ms per token")
    for name, use in expected.memory.items():
        milliseconds = 1e3 * sum(expected.seconds_by_term.get(name, {}).values())
        sizes = (use.weights_bytes, use.kv_bytes, use.compute_bytes, use.free_bytes - use.total_bytes, use.free_bytes)
        memory.add_row(
            name,
            *(format_bytes(n, digits=2) if n >= 0 else f"-{format_bytes(-n, digits=2)}" for n in sizes),
            f"{milliseconds:.1f}",
        )
    output.print()
    output.print(memory)
    if planned.hardware.gpus:
        layers = "layers with experts on a GPU" if planned.info.n_experts else "layers on a GPU"
        trade = plain_table("ubatch", "computing", layers, "tokens/s", "prompt tokens/s", "first token, s", left=())
        for one in trade_around(planned):
            trade.add_row(
                str(one.n_ubatch),
                format_bytes(one.compute_bytes, digits=2),
                str(one.expert_layers),
                f"{one.tokens_per_s:.1f}",
                f"{one.prompt_tokens_per_s:.0f}",
                f"{one.time_to_first_token_s:.2f}",
            )
        output.print()
        output.print(trade)
    output.print()
    if planned.expert_cache:
        output.print("llama-server has no cache of experts; its flags are those of --experts static:", style="dim")
    output.print("llama-server " + shlex.join(_server_flags(planned)), soft_wrap=True)
    if planned.hardware.source == "assumed":
        output.print("Some figures of the hardware are assumed; see docs/offload.md.", style="dim")


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
