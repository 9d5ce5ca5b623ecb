"""``overspill run``: the answer to a prompt, or the continuation of a text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import overspill
from overspill.cli.exits import guarded_command
from overspill.cli.options import (
    LoadOptions,
    MaxTokens,
    MinP,
    RepeatPenalty,
    Seed,
    System,
    Temperature,
    TopK,
    TopP,
    Verbose,
    complete_model,
    loads_a_model,
    only_given,
)
from overspill.cli.reply import BYTES_PER_TOKEN, default_model, is_model, load_model, print_stream
from overspill.hub import resolve

__all__ = ["run"]


@loads_a_model()
def run(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] PROMPT",
            help="MODEL is a GGUF file or a name that overspill list shows; without it, a small demo model is "
            "downloaded once. PROMPT - is read from standard input.",
            show_default=False,
            autocompletion=complete_model,
        ),
    ],
    system: System = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue PROMPT as a text, instead of answering it as a message.")
    ] = False,
    max_tokens: MaxTokens = 512,
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
    session: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep what was read and answered in FILE, and read only what is new of a prompt that begins with it.",
        ),
    ] = None,
    *,
    loading: LoadOptions,
    verbose: Verbose = False,
) -> None:
    """Answer PROMPT, or continue it where the model has no chat template.

    The text goes to standard output as it is generated, in a terminal behind the model's reasoning, dimmed. A line of
    stats goes to standard error.
    """
    with guarded_command(verbose=verbose):
        if len(arguments) > 2:
            raise ValueError(f"expected [MODEL] PROMPT, but got {len(arguments)} arguments; put the prompt in quotes")
        *given, prompt = arguments
        sampling = only_given(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repeat_penalty=repeat_penalty, seed=seed
        )
        if not given and is_model(prompt):
            raise ValueError(f'a PROMPT is missing: overspill run {prompt} "Why is the sky blue?"')
        if prompt == "-":
            prompt = sys.stdin.read()
        options = {
            "max_tokens": max_tokens or None,
            "stop": stop or (),
            "json_schema": _text_or_file(json_schema),
            "grammar": None if grammar is None else grammar.read_text(encoding="utf-8"),
            **only_given(session=session),
            **sampling,
        }
        if raw and system is not None:
            raise ValueError("give either --raw, which continues a text, or --system, which is for an answer")
        overspill.SamplingOptions(**sampling)  # mistakes are told before the model is loaded
        path = resolve(given[0]) if given else default_model()
        n_bytes = len((prompt + (system or "")).encode(errors="replace"))
        exchange = {
            "prompt_tokens": max(1, n_bytes // BYTES_PER_TOKEN),
            **({"reply_tokens": max_tokens} if max_tokens > 0 else {}),
        }
        with load_model(path, loading, **exchange) as model:
            if raw or not model.has_chat_template:
                if system is not None:
                    raise ValueError(
                        "--system is for models with a chat template, which this one has not; put it into PROMPT"
                    )
                code = print_stream(model.stream(prompt, **options))
            else:
                talk = overspill.Chat(model, system=system, **options)
                code = print_stream(talk.send(prompt))
    raise typer.Exit(code)


def _text_or_file(text: str | None) -> str | None:
    return text if text is None or text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8")
