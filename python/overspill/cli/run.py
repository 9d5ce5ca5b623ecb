"""``overspill run``: the continuation of a prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from overspill.cli.exits import guarded_command
from overspill.cli.options import (
    Batch,
    Context,
    ExpertsAt,
    Loading,
    MinP,
    OffloadTo,
    RepeatPenalty,
    Seed,
    Servers,
    Temperature,
    Threads,
    TopK,
    TopP,
    Verbose,
    only_given,
    parse_offload,
)
from overspill.cli.output import errors
from overspill.cli.reply import load_model, print_stream
from overspill.hub import demo_model, resolve

__all__ = ["run"]


def run(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] PROMPT",
            help="MODEL is a GGUF file or hf:OWNER/REPOSITORY/FILE.gguf; without it, Gemma 3 270M of the demo extra "
            "(a small base model, under the Gemma Terms of Use). PROMPT - is read from standard input.",
            show_default=False,
        ),
    ],
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", help="Tokens of the reply; 0: until the model or the context ends.")
    ] = 512,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repeat_penalty: RepeatPenalty = None,
    seed: Seed = None,
    json_schema: Annotated[
        str | None, typer.Option(help="A JSON schema that the reply fits, or the name of a file with one.")
    ] = None,
    grammar: Annotated[Path | None, typer.Option(help="A file with a grammar in GBNF that the reply fits.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the reply; may be repeated.")] = None,
    n_ctx: Context = None,
    n_threads: Threads = None,
    n_batch: Batch = None,
    offload: OffloadTo = "auto",
    experts: ExpertsAt = None,
    load_mode: Loading = None,
    rpc: Servers = None,
    verbose: Verbose = False,
) -> None:
    """Continue PROMPT: text on standard output as it is generated, then a line of stats on standard error."""
    with guarded_command(verbose=verbose):
        if len(arguments) > 2:
            raise ValueError(f"expected [MODEL] PROMPT, but got {len(arguments)} arguments; put the prompt in quotes")
        *given, prompt = arguments
        sampling = only_given(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repeat_penalty=repeat_penalty, seed=seed
        )
        if prompt == "-":
            prompt = sys.stdin.read()
        if given:
            path = resolve(given[0])
        else:
            path = demo_model()
            errors.print("Gemma 3 270M, a small base model, under the Gemma Terms of Use", style="dim")
        with (
            load_model(
                path,
                n_ctx=n_ctx,
                n_threads=n_threads,
                n_batch=n_batch,
                offload=parse_offload(offload),
                rpc=rpc or (),
                **only_given(load_mode=load_mode, experts=experts),
            ) as model,
            model.stream(
                prompt,
                max_tokens=max_tokens or None,
                stop=stop or (),
                json_schema=_text_or_file(json_schema),
                grammar=None if grammar is None else grammar.read_text(encoding="utf-8"),
                **sampling,
            ) as stream,
        ):
            code = print_stream(stream)
    raise typer.Exit(code)


def _text_or_file(text: str | None) -> str | None:
    return text if text is None or text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8")
