"""``overspill chat``: a conversation in the terminal, or one message from standard input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

import overspill
from overspill.base.checks import check_choice
from overspill.cli.exits import guarded_command
from overspill.cli.options import (
    Effort,
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
    check_writable,
    complete_model,
    loads_a_model,
    only_given,
)
from overspill.cli.output import errors
from overspill.cli.reply import default_model, load_model, print_stream
from overspill.hub import resolve

__all__ = ["chat"]


@loads_a_model()
def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A GGUF file with a chat template, or a name that overspill list shows; without it, a small demo "
            "model is downloaded once.",
            show_default=False,
            autocompletion=complete_model,
        ),
    ] = None,
    system: System = None,
    load: Annotated[Path | None, typer.Option(help="Go on with a conversation that /save wrote.")] = None,
    session: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Go on with the conversation in FILE, if there is one, and keep it there, with the state of the model "
            "in FILE.state.",
        ),
    ] = None,
    reasoning: Annotated[str, typer.Option(help="How the model's reasoning is shown: dim or hide.")] = "dim",
    reasoning_effort: Effort = None,
    max_tokens: MaxTokens = 0,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repeat_penalty: RepeatPenalty = None,
    seed: Seed = None,
    *,
    loading: LoadOptions,
    verbose: Verbose = False,
) -> None:
    """Talk with MODEL in the terminal; /help there lists the commands.

    Where standard input is no terminal, all of it is one message: the answer goes to standard output, without
    reasoning, and the stats to standard error.
    """
    # These import Markdown, highlighting and line editing, which would slow down the start of every other command.
    from overspill.cli.terminal.chat import ChatTerminal
    from overspill.cli.terminal.screen import Reasoning

    with guarded_command(verbose=verbose):
        sampling = only_given(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repeat_penalty=repeat_penalty, seed=seed
        )
        options = sampling | only_given(reasoning_effort=reasoning_effort, max_tokens=max_tokens or None)
        overspill.SamplingOptions(**sampling)  # mistakes are told before the model is loaded
        check_choice("--reasoning", reasoning, get_args(Reasoning))
        if session is not None:
            if load is not None:
                raise ValueError("give either --session, which keeps the conversation in its file, or --load")
            check_writable(session)
            load = session if session.exists() else None
        message = None if sys.stdin.isatty() else sys.stdin.read()
        if message is not None and not message.strip():
            raise ValueError("standard input is empty, and would be the message")
        with load_model(default_model() if model is None else resolve(model), loading) as loaded:
            talk = overspill.Chat(loaded, **options) if load is None else overspill.Chat.load(load, loaded, **options)
            if system is not None:
                talk.system = system
            if message is None:
                # A person would rather lose the oldest turns than be stopped by a full context.
                talk.options["on_full"] = "shift"
                ChatTerminal(
                    talk,
                    errors,
                    reasoning=cast(Reasoning, reasoning),
                    file=load,
                    session=session,
                    verbose=verbose,
                ).run()
                return
            code = print_stream(talk.send(message))
            if session is not None:
                talk.save(session, state=True)
    raise typer.Exit(code)
