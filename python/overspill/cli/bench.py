"""``overspill bench``: how fast a model reads and decodes, beside what the memory allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from overspill.cli.exits import guarded_command
from overspill.cli.options import LoadOptions, ModelFile, Verbose, check_writable, loads_a_model
from overspill.cli.output import errors, progress_bar, report_output
from overspill.studies.bench.measure import bench as run_bench
from overspill.studies.bench.plot import check_plotting

__all__ = ["bench"]


@loads_a_model(without=["n_ctx", "prompt_cache"])
def bench(
    model: ModelFile,
    n_prompt: Annotated[int, typer.Option("--n-prompt", "-p", help="Tokens of the prompt; 0 leaves it out.")] = 512,
    n_gen: Annotated[int, typer.Option("--n-gen", "-n", help="Tokens to decode, at least 4.")] = 128,
    n_depth: Annotated[int, typer.Option("--n-depth", "-d", help="Tokens in the context before decoding.")] = 0,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", help="Repetitions of each measurement.")] = 5,
    *,
    loading: LoadOptions,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="PICTURE", help="Draw where a token's time goes, as PNG, SVG or PDF; needs matplotlib."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, as llama-bench --output json does.")] = False,
    verbose: Verbose = False,
) -> None:
    """Measure how fast MODEL reads a prompt and decodes, and how near that comes to the speed of the memory.

    Options that llama-bench has as well have the same names.
    """
    with guarded_command(verbose=verbose):
        if plot is not None:
            check_writable(plot)
            check_plotting(plot)
        with progress_bar("loading") as show:
            found = run_bench(
                loading.model(model),
                n_prompt=n_prompt,
                n_gen=n_gen,
                n_depth=n_depth,
                repetitions=repetitions,
                progress=show,
                **loading.given(),
            )
        if plot is not None:
            found.plot(plot)
        if as_json:
            print(json.dumps(found.to_dicts(), indent=2))
        else:
            report_output().print(found)
        if plot is not None:
            errors.print(f"the picture is in {plot}", style="dim", soft_wrap=True)
