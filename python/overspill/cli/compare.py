"""``overspill compare``: the answers of several models to the same questions."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

import overspill
from overspill.cli.exits import ERROR, INTERRUPTED, guarded_command
from overspill.cli.options import (
    MAX_TOKENS,
    MIN_P,
    OFFLOAD,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    Effort,
    Json,
    LoadOptions,
    System,
    Verbose,
    check_writable,
    complete_model,
    loads_a_model,
    only_given,
    parse_offload,
)
from overspill.cli.output import Output, errors, late_progress_bar
from overspill.studies.compare.view import Columns, Sections

__all__ = ["compare"]


@loads_a_model(without=["offload", "override", "prompt_cache"])
def compare(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL MODEL... QUESTION",
            help="Two or more GGUF files or hf:OWNER/REPOSITORY/FILE.gguf, and the question; - reads it from standard "
            "input. With --questions: models alone.",
            show_default=False,
            autocompletion=complete_model,
        ),
    ],
    questions: Annotated[
        Path | None,
        typer.Option(
            help="A file with a question on each line, or a JSON list of them; each begins a new conversation."
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write an HTML page of the comparison, which loads nothing else.")
    ] = None,
    system: System = None,
    reasoning_effort: Effort = None,
    max_tokens: Annotated[
        int,
        typer.Option(*MAX_TOKENS, help="Tokens of each answer; 0: until the model or the context ends."),
    ] = 1024,
    temperature: Annotated[
        float | None,
        typer.Option("--temp", "--temperature", help=TEMPERATURE, show_default="each file's, or 0.8"),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help=TOP_K, show_default="each file's, or 40")] = None,
    top_p: Annotated[float | None, typer.Option(help=TOP_P, show_default="each file's, or 0.95")] = None,
    min_p: Annotated[float | None, typer.Option(help=MIN_P, show_default="each file's, or 0.05")] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", "-s", help="The seed of all models.", show_default="drawn")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be repeated.")] = None,
    offload: Annotated[
        list[str] | None,
        typer.Option(
            *OFFLOAD,
            help="Placement of the weights: auto, cpu, gpu (or all), tuned, a number of layers for the GPU, or a file "
            "of overspill plan --save; once for all models, or once for each, in their order.",
            show_default="auto",
        ),
    ] = None,
    *,
    loading: LoadOptions,
    no_progress: Annotated[
        bool, typer.Option("--no-progress", help="Print one answer below the other, without bars and growing columns.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Ask models the same QUESTION, and show their answers, speeds and memory side by side.

    They answer one after the other, and share the memory only if all fit into it. Ctrl-C ends the comparison and
    keeps the answers so far.
    """
    with guarded_command(verbose=verbose):
        models, asked = _models_and_questions(arguments, questions)
        if html is not None:
            check_writable(html)
        sampling = only_given(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        given = [parse_offload(text) for text in offload or ["auto"]]
        with ExitStack() as stack:
            view: Columns | Sections | None = None
            progress: Callable[[str, float], object]
            output = Output()
            if not as_json and not no_progress and Columns.fit(output, len(models)):
                view = stack.enter_context(Columns(output, len(models)))
                progress = view.progress
            else:
                view = None if as_json else stack.enter_context(Sections(output))
                progress = (lambda what, share: None) if no_progress else stack.enter_context(late_progress_bar())
            found = overspill.compare(
                models,
                asked,
                system=system,
                reasoning_effort=reasoning_effort,
                offload=given if len(given) > 1 else given[0],
                seed=seed,
                progress=progress,
                report=None if view is None else view.report,
                max_tokens=max_tokens or None,
                stop=stop or (),
                **sampling,
                **loading.given(),
            )
        if as_json:
            print(json.dumps(found.to_dict(), indent=2))
        else:
            for sentence in ["", *found.summary()]:
                output.print(sentence, style="bold", soft_wrap=not output.is_terminal)
        if html is not None:
            html.write_text(found.to_html(), encoding="utf-8")
            errors.print(f"written: {html}", style="dim", soft_wrap=True)
    for problem in found.problems:
        errors.print(f"error: {problem}", soft_wrap=True)
    if found.stopped:
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(ERROR if found.problems else 0)


def _models_and_questions(arguments: list[str], file: Path | None) -> tuple[list[str], list[str]]:
    if file is None:
        *models, question = arguments
        if question.endswith(".gguf") and len(question.split()) == 1:
            raise ValueError(
                f"{question} is a model: put the question, in quotes, after the models, or give --questions"
            )
        asked = [sys.stdin.read() if question == "-" else question]
    else:
        models = arguments
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8-sig")
        asked = [line.strip() for line in text.splitlines() if line.strip()]
        if file.suffix == ".json":
            asked = json.loads(text)
            if not isinstance(asked, list) or not all(isinstance(question, str) for question in asked):
                raise ValueError(f"{file} must hold a list of questions as strings")
        if not asked:
            raise ValueError(f"{file} holds no questions")
    if len(models) < 2:
        raise ValueError(
            f"two or more models can be compared, and here is {len(models)}: overspill compare A.gguf B.gguf QUESTION"
        )
    return models, asked
