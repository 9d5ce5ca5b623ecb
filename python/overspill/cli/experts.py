"""``overspill experts``: which experts a model uses, and what a cache of them would be worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

import overspill
from overspill._core import UNKNOWN_EXPERT
from overspill.base.checks import check_choice
from overspill.cli.exits import guarded_command
from overspill.cli.hardware import GpuBandwidth, Link, Ram, RamBandwidth, Vram, check_hardware, hardware_of
from overspill.cli.options import (
    MAX_TOKENS,
    MODEL,
    Json,
    LoadOptions,
    Seed,
    Temperature,
    Verbose,
    check_writable,
    complete_model,
    loads_a_model,
    only_given,
)
from overspill.cli.output import errors, progress_bar, report_output
from overspill.planning.expert_cache import ExpertCachePlan
from overspill.studies.bench.plot import check_plotting
from overspill.studies.experts.study import COMPARED_POLICIES, RESIDENT_SHARES
from overspill.studies.experts.trace import POLICIES, Policy, TracedTokens

__all__ = ["experts"]


# All experts are in RAM, and --experts is a number here.
@loads_a_model(without=["offload", "experts", "memory", "rpc", "prompt_cache"])
def experts(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help=MODEL,
            show_default=False,
            autocompletion=complete_model,
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="The text to continue.", show_default=False)
    ] = None,
    file: Annotated[
        list[Path] | None, typer.Option(metavar="TEXT", help="A file with the text to continue; may be repeated.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="Read a trace, in place of recording one with MODEL.")
    ] = None,
    max_tokens: Annotated[
        int,
        typer.Option(*MAX_TOKENS, help="Tokens to decode after each text, from 0."),
    ] = 256,
    tokens: Annotated[
        str | None,
        typer.Option(help="The tokens to replay: decoded, prompt or all.", show_default="decoded, if there are any"),
    ] = None,
    resident: Annotated[
        list[str] | None,
        typer.Option(metavar="SHARE", help="Experts to hold, such as 25%; may be repeated.", show_default="5% to 60%"),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="lru, second-touch, lfu, fixed, belady, lru-one-insertion or lru-shared; may be repeated.",
            show_default="the first five",
        ),
    ] = None,
    n_experts: Annotated[
        int | None,
        typer.Option("--experts", help="Experts of a layer.", show_default="as MODEL or the trace has it"),
    ] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE.npz", help="Write the trace to a file.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="PICTURE", help="Draw a heat map and the hits, as PNG, SVG or PDF; needs matplotlib."),
    ] = None,
    vram: Vram = None,
    ram: Ram = None,
    gpu_bandwidth: GpuBandwidth = None,
    ram_bandwidth: RamBandwidth = None,
    link: Link = None,
    temperature: Temperature = None,
    seed: Seed = None,
    *,
    loading: LoadOptions,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show which experts MODEL uses, and what a cache of them on a GPU would have answered.

    All experts are loaded into RAM. With a GPU, here or given by --ram and --vram, there is a forecast of the speed.
    """
    with guarded_command(verbose=verbose):
        if plot is not None:
            check_writable(plot)
            check_plotting(plot)
        if save is not None:
            check_writable(save)
            if save.suffix != ".npz":
                raise ValueError(f"--save must end in .npz, not {save}")
        shares = [_share(text) for text in resident or ()] or RESIDENT_SHARES
        for one in policy or ():
            check_choice("--policy", one, POLICIES)
        if tokens is not None:
            check_choice("--tokens", tokens, get_args(TracedTokens))
        if n_experts is not None and not 1 <= n_experts < UNKNOWN_EXPERT:
            raise ValueError(f"--experts must be 1 to {UNKNOWN_EXPERT - 1}, not {n_experts}")
        hardware: dict[str, Any] = {
            "vram": vram,
            "ram": ram,
            "gpu_bandwidth": gpu_bandwidth,
            "ram_bandwidth": ram_bandwidth,
            "link": link,
        }
        check_hardware(**hardware)
        if model is None and any(hardware.values()):
            raise ValueError("a forecast needs MODEL, for the size of its experts")
        given = [*([prompt] if prompt is not None else []), *map(_text, file or ())]
        if trace is None and n_experts is not None:
            raise ValueError("--experts is for --trace: a model says how many it has")
        if trace is not None and any(one is not None for one in (temperature, seed, loading.n_threads)):
            raise ValueError("--temperature, --seed and --threads are for recording a trace, and --trace reads one")
        if trace is None and (model is None or not given):
            raise ValueError("give MODEL and a PROMPT or --file, or --trace with a file")
        if trace is not None and given:
            raise ValueError("--trace is read in place of texts: give no PROMPT and no --file")
        header = None if model is None else loading.model(model)
        cache = None if header is None else _cache(header, hardware, loading.n_ctx)
        if trace is not None:
            known = n_experts if n_experts is not None or header is None else header.n_experts
            recorded = overspill.ExpertTrace.load(trace, n_experts=known or None)
        else:
            sampling: dict[str, Any] = only_given(temperature=temperature, seed=seed)
            with progress_bar("loading") as show:
                recorded = overspill.trace_experts(
                    cast(overspill.ModelInfo, header),
                    given,
                    max_tokens=max_tokens,
                    progress=show,
                    **sampling,
                    **loading.given(),
                )
        if save is not None:
            recorded.save(save)
        chosen = tokens or ("decoded" if len(recorded.routes("decoded")) else "prompt")
        study = overspill.replay_experts(
            recorded,
            resident=shares,
            policies=cast(list[Policy], policy) or COMPARED_POLICIES,
            tokens=cast(TracedTokens, chosen),
            cache=cache,
        )
        if plot is not None:
            study.plot(plot)
        if as_json:
            print(json.dumps(study.to_dict(), indent=1))
        else:
            report_output().print(study)
        for written, what in ((save, "trace"), (plot, "picture")):
            if written is not None:
                errors.print(f"the {what} is in {written}", style="dim", soft_wrap=True)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise overspill.Error(f"--file {file}: {error.strerror or error}") from None


def _cache(header: overspill.ModelInfo, hardware: dict[str, Any], n_ctx: int | None) -> ExpertCachePlan | None:
    """Return what to expect on the given hardware, or on this machine; None without a GPU or without experts."""
    is_given = any(hardware.values())
    if not header.expert_layers or not (is_given or any(device.is_gpu for device in overspill.devices())):
        return None
    found = hardware_of(header, unpinned_link=None, **hardware)
    return overspill.plan_expert_cache(header, found, n_ctx=n_ctx)


def _share(text: str) -> float:
    number, percent, rest = text.partition("%")
    try:
        share = float(number) / 100 if percent else float(number)
    except ValueError:
        share = 0.0
    if rest or not 0 < share <= 1:
        raise ValueError(f"--resident must be a share such as 25% or 0.25, over 0 and at most 1, not {text!r}")
    return share
