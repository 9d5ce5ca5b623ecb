"""The command line. Text goes to standard output; everything about it to standard error."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast, get_args

import typer
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import overspill
from overspill import _core
from overspill.base.units import parse_bytes
from overspill.base.values import CacheType, LoadMode
from overspill.engine.model import Offload
from overspill.hub import demo_model, resolve
from overspill.machine.rpc_server import serve
from overspill.studies.bench import bench as run_bench
from overspill.studies.bench import check_plotting
from overspill.studies.compare.view import Columns, Sections
from overspill.studies.doctor import examine
from overspill.studies.tune import Trial, Tuned
from overspill.studies.tune import tune as find_fastest

__all__ = ["main"]

EXIT_CODES = "Exit codes: 0 done, 1 an error, 2 a wrong command line, 130 interrupted, 141 nobody reads the output."
ERROR, USAGE, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141

app = typer.Typer(
    help="Run language models bigger than your GPU.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# Width and colours are those of the terminal; without one there are no colours.
errors = Console(stderr=True, highlight=False)


class _Output(Console):
    """Standard output."""

    def on_broken_pipe(self) -> None:
        """Leave it to :func:`_one_line_errors`, instead of ending with an exit code of its own."""
        raise


def _fail(message: str, code: int) -> NoReturn:
    errors.print(f"error: {message}", markup=False, soft_wrap=True)
    raise typer.Exit(code)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn what a user can cause into one line and an exit code."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone, as `head` does; without this Python would complain at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(PIPE_CLOSED) from None
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    except (ValueError, TypeError) as error:
        _fail(str(error), USAGE)
    except (overspill.Error, OSError) as error:
        _fail(str(error), ERROR)


def _set_up(verbose: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logger = logging.getLogger("overspill")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    if not verbose:
        # llama.cpp's warnings are many and seldom a user's business; its errors are in ours.
        logging.getLogger("overspill.llama").setLevel(logging.CRITICAL)
    for stream in (sys.stdout, sys.stderr, sys.stdin):
        # Text is UTF-8 whatever the locale says; what is not text is replaced.
        cast(Any, stream).reconfigure(encoding="utf-8", errors="replace")


def _offload(value: str) -> Offload:
    if value.endswith(".json"):
        return overspill.Placement.load(value)
    return int(value) if value.isdecimal() else cast(Offload, value)


Temperature = Annotated[
    float | None,
    typer.Option("--temperature", "-t", help="0: always the most likely token.", show_default="the file's, or 0.8"),
]
TopK = Annotated[
    int | None, typer.Option(help="Keep so many of the most likely tokens; 0: all.", show_default="the file's, or 40")
]
TopP = Annotated[
    float | None,
    typer.Option(help="Keep the likeliest tokens up to this probability; 1: all.", show_default="the file's, or 0.95"),
]
MinP = Annotated[
    float | None,
    typer.Option(help="Drop tokens below this share of the likeliest; 0: none.", show_default="the file's, or 0.05"),
]
RepeatPenalty = Annotated[
    float | None,
    typer.Option(help="Divide the logits of the last 64 tokens; 1: off.", show_default="the file's, or 1.0"),
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]
Context = Annotated[int | None, typer.Option("--ctx", help="Tokens of prompt and reply together.")]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads; default: physical cores.")]
Batch = Annotated[int, typer.Option("--batch", help="Tokens of the prompt processed at once.")]
OffloadTo = Annotated[
    str,
    typer.Option(help="auto, cpu, gpu, tuned, a number of layers for the GPU, or a file of overspill plan --save."),
]
Loading = Annotated[str, typer.Option(help="mmap, read, mlock, mmap+mlock or direct-io.")]
Servers = Annotated[
    list[str] | None,
    typer.Option(metavar="HOST:PORT", help="Use the devices of overspill serve-device there; may be repeated."),
]
DeviceMemory = Annotated[
    list[str] | None,
    typer.Option(metavar="DEVICE=SIZE", help="Use no more of a device, as in gpu=20GiB; may be repeated."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show llama.cpp's log.")]


@app.command(epilog=EXIT_CODES)
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
        int, typer.Option("--max-tokens", "-n", help="0: until the model or the context ends.")
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
    n_batch: Batch = 512,
    offload: OffloadTo = "auto",
    load_mode: Loading = "mmap",
    rpc: Servers = None,
    verbose: Verbose = False,
) -> None:
    """Continue PROMPT: text as it is made on standard output, then one line of stats on standard error."""
    _set_up(verbose)
    if len(arguments) > 2:
        _fail(f"expected [MODEL] PROMPT, but got {len(arguments)} arguments; put the prompt in quotes", USAGE)
    *given, prompt = arguments
    sampling = _given(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repeat_penalty=repeat_penalty, seed=seed
    )
    with _one_line_errors():
        if prompt == "-":
            prompt = sys.stdin.read()
        if given:
            path = resolve(given[0])
        else:
            path = demo_model()
            errors.print("Gemma 3 270M, a small base model, under the Gemma Terms of Use", style="dim")
        with (
            _load(
                path,
                n_ctx=n_ctx,
                n_threads=n_threads,
                n_batch=n_batch,
                offload=_offload(offload),
                load_mode=cast(LoadMode, load_mode),
                rpc=rpc or (),
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
            code = _print_stream(stream)
    raise typer.Exit(code)


def _given(**options: Any) -> dict[str, Any]:
    """Leave out what is not given: there the model's file decides, or else llama.cpp's default."""
    return {name: value for name, value in options.items() if value is not None}


def _text_or_file(text: str | None) -> str | None:
    return text if text is None or text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8")


@contextmanager
def _bar(what: str) -> Iterator[Callable[[str, float], None]]:
    """Show a bar on a terminal; yield what takes a description and the share that is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda description, share: bar.update(task, description=description, completed=share)


def _load(path: os.PathLike[str], **options: Any) -> overspill.Model:
    with _bar("loading") as show:
        return overspill.Model(path, progress=lambda share: show("loading", share), **options)


@app.command(epilog=EXIT_CODES)
def chat(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A GGUF file with a chat template, or hf:OWNER/REPOSITORY/FILE.gguf.",
            show_default=False,
        ),
    ],
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    load: Annotated[Path | None, typer.Option(help="Go on with a conversation that /save wrote.")] = None,
    reasoning: Annotated[str, typer.Option(help="How the model's reasoning is shown: dim or hide.")] = "dim",
    reasoning_effort: Annotated[
        str | None, typer.Option("--effort", help="Of models that know it, such as gpt-oss: low, medium or high.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", help="Of each reply; 0: until the model or the context ends.")
    ] = 0,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repeat_penalty: RepeatPenalty = None,
    seed: Seed = None,
    n_ctx: Context = None,
    n_threads: Threads = None,
    n_batch: Batch = 512,
    offload: OffloadTo = "auto",
    load_mode: Loading = "mmap",
    rpc: Servers = None,
    verbose: Verbose = False,
) -> None:
    """Talk with MODEL in the terminal; /help there says how.

    Where standard input is no terminal, all of it is one message: the answer goes to standard output, without
    reasoning, and the stats to standard error.
    """
    # What it needs would slow down every other command.
    from overspill.cli.terminal.chat import ChatTerminal, Reasoning

    _set_up(verbose)
    sampling = _given(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repeat_penalty=repeat_penalty, seed=seed
    )
    options = sampling | _given(reasoning_effort=reasoning_effort, max_tokens=max_tokens or None)
    with _one_line_errors():
        overspill.SamplingOptions(**sampling)  # mistakes are told before the model is loaded
        if reasoning not in get_args(Reasoning):
            raise ValueError(f"--reasoning must be one of {', '.join(get_args(Reasoning))}, not {reasoning!r}")
        message = None if sys.stdin.isatty() else sys.stdin.read()
        if message is not None and not message.strip():
            raise ValueError("standard input is empty, and would be the message")
        with _load(
            resolve(model),
            n_ctx=n_ctx,
            n_threads=n_threads,
            n_batch=n_batch,
            offload=_offload(offload),
            load_mode=cast(LoadMode, load_mode),
            rpc=rpc or (),
        ) as loaded:
            talk = overspill.Chat(loaded, **options) if load is None else overspill.Chat.load(load, loaded, **options)
            if system is not None:
                talk.system = system
            if message is None:
                # A person would rather lose the oldest turns than be stopped by a full context.
                talk.options["on_full"] = "shift"
                ChatTerminal(talk, errors, reasoning=cast(Reasoning, reasoning), file=load).run()
                return
            code = _print_stream(talk.send(message))
    raise typer.Exit(code)


def _print_stream(stream: overspill.Stream | overspill.ChatStream) -> int:
    code = 0
    try:
        with stream:
            for token in stream:
                if not (isinstance(token, overspill.ChatToken) and token.channel is overspill.Channel.REASONING):
                    sys.stdout.write(token.text)
                    sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.stdout.write("\n")
    sys.stdout.flush()
    errors.print(str(stream.stats), style="dim", markup=False)
    return code


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.2f} MiB"


def _table(*headings: str) -> Table:
    # Columns for reading, without a box, so that a pipe gets plain text.
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        right = heading not in ("", "name", "kind", "backend", "description", "part", "device", "setting", "value")
        table.add_column(heading, justify="right" if right else "left", no_wrap=right, overflow="fold")
    return table


def _output() -> Console:
    # A pipe has no width: nothing is cut or wrapped there.
    return _Output(highlight=False, width=None if sys.stdout.isatty() else 200)


Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(epilog=EXIT_CODES)
def compare(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL MODEL... QUESTION",
            help="Two or more GGUF files or hf:OWNER/REPOSITORY/FILE.gguf, and the question; - reads it from standard "
            "input. With --questions: models alone.",
            show_default=False,
        ),
    ],
    questions: Annotated[
        Path | None,
        typer.Option(help="A file with a question on each line, or a JSON list of them; each begins anew."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with all of it, that loads nothing else.")] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt, for models with a chat template.")] = None,
    reasoning_effort: Annotated[
        str | None, typer.Option(help="For models that know it, such as gpt-oss: low, medium or high.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", help="Of each answer; 0: until the model or the context ends.")
    ] = 1024,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature", "-t", help="0: always the most likely token.", show_default="each file's, or 0.8"
        ),
    ] = None,
    top_k: Annotated[int | None, typer.Option(show_default="each file's, or 40")] = None,
    top_p: Annotated[float | None, typer.Option(show_default="each file's, or 0.95")] = None,
    min_p: Annotated[float | None, typer.Option(show_default="each file's, or 0.05")] = None,
    seed: Annotated[int | None, typer.Option(help="The same for all models.", show_default="drawn")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be repeated.")] = None,
    n_ctx: Annotated[int | None, typer.Option("--ctx", help="Tokens of question and answer together.")] = None,
    n_threads: Threads = None,
    n_batch: Annotated[int, typer.Option("--batch", help="Tokens of the question processed at once.")] = 512,
    offload: Annotated[
        list[str] | None,
        typer.Option(
            help="auto, cpu, gpu, tuned, a number of layers for the GPU, or a file of overspill plan --save: once for "
            "all models, or once for each, in their order.",
            show_default="auto",
        ),
    ] = None,
    memory: DeviceMemory = None,
    load_mode: Loading = "mmap",
    rpc: Servers = None,
    no_progress: Annotated[
        bool, typer.Option("--no-progress", help="No columns that grow and no bars: one answer below the other.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Ask models the same QUESTION, and show their answers, speeds and memory side by side.

    They answer one after the other, and share the memory only if all fit into it. Ctrl-C ends it and keeps what
    there is.
    """
    _set_up(verbose)
    with _one_line_errors():
        models, asked = _models_and_questions(arguments, questions)
        if html is not None:
            _check_place(html)
        sampling = _given(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        given = [_offload(text) for text in offload or ["auto"]]
        with ExitStack() as stack:
            view: Columns | Sections | None = None
            progress: Callable[[str, float], object]
            output = _Output(highlight=False)
            if not as_json and not no_progress and Columns.fit(output, len(models)):
                view = stack.enter_context(Columns(output, len(models)))
                progress = view.progress
            else:
                view = None if as_json else stack.enter_context(Sections(output))
                progress = (lambda what, share: None) if no_progress else stack.enter_context(_late_bar())
            found = overspill.compare(
                models,
                asked,
                system=system,
                reasoning_effort=reasoning_effort,
                offload=given if len(given) > 1 else given[0],
                rpc=rpc or (),
                n_ctx=n_ctx,
                n_batch=n_batch,
                n_threads=n_threads,
                load_mode=cast(LoadMode, load_mode),
                memory=_sizes(memory),
                seed=seed,
                progress=progress,
                report=None if view is None else view.report,
                max_tokens=max_tokens or None,
                stop=stop or (),
                **sampling,
            )
        if as_json:
            print(json.dumps(found.to_dict(), indent=2))
        else:
            for sentence in ["", *found.summary()]:
                output.print(sentence, style="bold", markup=False, soft_wrap=not output.is_terminal)
        if html is not None:
            html.write_text(found.to_html(), encoding="utf-8")
            errors.print(f"written: {html}", style="dim", markup=False, soft_wrap=True)
    for problem in found.problems:
        errors.print(f"error: {problem}", markup=False, soft_wrap=True)
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


def _check_place(file: Path) -> None:
    """Raise what is wrong with a file's place before much time is spent on what goes there."""
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder; give a file in it, such as {file / 'report.html'}")
    if not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise OSError(f"{file} cannot be written: its folder is missing, or not yours to write to")


@contextmanager
def _late_bar() -> Iterator[Callable[[str, float], None]]:
    """As :func:`_bar`, for a bar that comes and goes."""
    with ExitStack() as stack:
        shown: list[Callable[[str, float], None]] = []

        def show(what: str, share: float) -> None:
            if not shown:
                shown.append(stack.enter_context(_bar(what)))
            shown[0](what, share)
            if share >= 1:
                stack.close()
                shown.clear()

        yield show


@app.command(epilog=EXIT_CODES)
def devices(as_json: Json = False) -> None:
    """List the devices that models can run on."""
    _set_up(verbose=False)
    with _one_line_errors():
        found = overspill.devices()
        if as_json:
            print(json.dumps([asdict(device) for device in found], indent=2))
            return
        table = _table("name", "kind", "backend", "free", "total", "description")
        for device in found:
            row = (device.name, device.kind.replace("_", " "), device.backend)
            table.add_row(*row, _size(device.free_bytes), _size(device.total_bytes), device.description)
        _output().print(table)


@app.command(epilog=EXIT_CODES)
def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file, or hf:OWNER/REPOSITORY/FILE.gguf.")],
    as_json: Json = False,
) -> None:
    """Show what a model is made of, from its file's header."""
    _set_up(verbose=False)
    with _one_line_errors():
        header = overspill.ModelInfo.from_file(resolve(model))
        experts = f"{header.n_experts}, {header.n_experts_used} used per token" if header.n_experts else "none"
        facts: dict[str, object] = {
            "name": header.name or "unknown",
            "architecture": header.architecture,
            "licence": header.licence or "not stated",
            "parameters": f"{header.n_parameters:,}",
            "quantisation": f"{header.quantisation} ({', '.join(header.bytes_by_type)})",
            "layers": header.n_layers,
            "experts": experts,
            "width": header.n_embd,
            "vocabulary": f"{header.n_vocab:,}",
            "context": f"{header.n_ctx_train:,} tokens",
            "files": f"{len(header.files)}, {_size(header.file_bytes)}",
            "read per token": _size(header.bytes_per_token),
            "sampling": f"{header.sampling} ({'of the file' if header.recommends_sampling else 'defaults'})",
        }
        if as_json:
            print(
                json.dumps(
                    {
                        "name": header.name,
                        "architecture": header.architecture,
                        "licence": header.licence,
                        "n_parameters": header.n_parameters,
                        "quantisation": header.quantisation,
                        "n_layers": header.n_layers,
                        "n_experts": header.n_experts,
                        "n_experts_used": header.n_experts_used,
                        "n_embd": header.n_embd,
                        "n_vocab": header.n_vocab,
                        "n_ctx_train": header.n_ctx_train,
                        "files": header.files,
                        "file_bytes": header.file_bytes,
                        "bytes_per_token": header.bytes_per_token,
                        "bytes_by_part": header.bytes_by_part,
                        "bytes_by_type": header.bytes_by_type,
                        "sampling": asdict(header.sampling),
                    },
                    indent=2,
                )
            )
            return
        summary = _table("", "")
        summary.show_header = False
        for label, value in facts.items():
            summary.add_row(label, str(value))
        sizes = _table("part", "size", "share")
        total = sum(header.bytes_by_part.values()) or 1
        for part, n_bytes in header.bytes_by_part.items():
            if n_bytes:
                label = "embedding, output too" if part == "embedding" and header.tied_embedding else part
                sizes.add_row(label, _size(n_bytes), f"{n_bytes / total:.1%}")
        output = _output()
        output.print(summary, markup=False)
        output.print()
        output.print(sizes)


@app.command(epilog=EXIT_CODES)
def tune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file, or hf:OWNER/REPOSITORY/FILE.gguf.")],
    n_ctx: Annotated[int | None, typer.Option("--ctx", help="Tokens of prompt and reply together.")] = None,
    memory: DeviceMemory = None,
    kv_type: Annotated[
        list[str] | None,
        typer.Option(help="Try this type of the KV cache too, such as q8_0; may be repeated. It may change replies."),
    ] = None,
    rpc: Servers = None,
    seconds: Annotated[float | None, typer.Option(help="Begin nothing new after so long.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what decodes MODEL fastest here, from the plan on, and keep it for Model(path, offload="tuned").

    Ctrl-C ends it and keeps the best so far.
    """
    _set_up(verbose=False)
    with _one_line_errors():
        sizes = _sizes(memory)
        console = errors if as_json else _output()
        with _Trials(console, quiet=as_json and not console.is_terminal) as trials:
            found = find_fastest(
                model,
                n_ctx=n_ctx,
                memory=sizes,
                allow_kv_types=cast("list[CacheType]", kv_type or []),
                rpc=rpc or (),
                seconds=seconds,
                report=trials.report,
            )
        if as_json:
            print(json.dumps(_tuned(found), indent=2))
        else:
            _print_tuned(found)
    if found.stopped == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _sizes(memory: list[str] | None) -> dict[str, str]:
    return dict(_pair("--memory", "DEVICE=SIZE, such as gpu=20GiB", text) for text in memory or ())


def _pair(option: str, form: str, text: str) -> tuple[str, str]:
    # A pin may be a regular expression with a sign of its own.
    what, equals, value = text.rpartition("=")
    if not (what and equals and value):
        raise ValueError(f"{option} must be {form}, not {text!r}")
    return what, value


@app.command(epilog=EXIT_CODES)
def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file, or hf:OWNER/REPOSITORY/FILE.gguf.")],
    n_prompt: Annotated[int, typer.Option("--n-prompt", "-p", help="Tokens of the prompt; 0 leaves it out.")] = 512,
    n_gen: Annotated[int, typer.Option("--n-gen", "-n", help="Tokens to decode, at least 4.")] = 128,
    n_depth: Annotated[int, typer.Option("--n-depth", "-d", help="Tokens in the context before decoding.")] = 0,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", help="Times that each is measured.")] = 5,
    offload: OffloadTo = "auto",
    memory: DeviceMemory = None,
    n_threads: Threads = None,
    n_batch: Batch = 512,
    type_k: Annotated[str, typer.Option(help="Type of the KV cache's keys.")] = "f16",
    type_v: Annotated[str, typer.Option(help="Type of the KV cache's values.")] = "f16",
    load_mode: Loading = "mmap",
    rpc: Servers = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="PICTURE", help="Draw where a token's time goes, as PNG, SVG or PDF; needs matplotlib."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, as llama-bench --output json does.")] = False,
    verbose: Verbose = False,
) -> None:
    """Measure how fast MODEL reads a prompt and decodes, and how near that comes to the speed of the memory.

    The options that llama-bench has too are called as there.
    """
    _set_up(verbose)
    with _one_line_errors():
        if plot is not None:
            _check_place(plot)
            check_plotting(plot)
        with _bar("loading") as show:
            found = run_bench(
                resolve(model),
                n_prompt=n_prompt,
                n_gen=n_gen,
                n_depth=n_depth,
                repetitions=repetitions,
                offload=_offload(offload),
                rpc=rpc or (),
                n_batch=n_batch,
                n_threads=n_threads,
                type_k=cast(CacheType, type_k),
                type_v=cast(CacheType, type_v),
                load_mode=cast(LoadMode, load_mode),
                memory=_sizes(memory),
                progress=show,
            )
        if plot is not None:
            found.plot(plot)
        if as_json:
            print(json.dumps(found.to_dicts(), indent=2))
        else:
            _output().print(found)
        if plot is not None:
            errors.print(f"the picture is in {plot}", style="dim", markup=False, soft_wrap=True)


class _Trials:
    """What was tried so far: a table that grows in a terminal, and lines elsewhere."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self._console, self._quiet = console, quiet
        self._trials: list[Trial] = []
        self._live = Live(console=console, get_renderable=self._render, auto_refresh=False)

    def __enter__(self) -> _Trials:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._trials = [trial for trial in self._trials if trial.state != "measuring"]
        if self._console.is_terminal:
            self._live.stop()

    def report(self, trial: Trial) -> None:
        """Show that a trial began, or what came of it."""
        if self._trials and self._trials[-1].state == "measuring":
            self._trials.pop()
        self._trials.append(trial)
        if self._console.is_terminal:
            self._live.refresh()
        elif trial.state != "measuring" and not self._quiet:
            self._console.print(*_row(trial)[:4], trial.problem, markup=False, soft_wrap=True)

    def _render(self) -> Table:
        table = _table("setting", "value", "tok/s", "")
        for trial in self._trials:
            setting, value, speed, outcome = _row(trial)
            table.add_row(setting, value, speed, outcome, style="bold" if trial.state == "kept" else None)
        return table


def _row(trial: Trial) -> tuple[str, str, str, str]:
    speed = "–" if trial.tokens_per_s is None else f"{trial.tokens_per_s:.2f}"
    return trial.setting, trial.value, speed, f"{trial.state}{'…' if trial.state == 'measuring' else ''}"


def _print_tuned(found: Tuned) -> None:
    output = _output()
    why = f" ({found.stopped}: not everything was tried)" if found.stopped else ""
    gain = found.tokens_per_s / found.planned_tokens_per_s - 1
    output.print(f"\nbest: {found.tokens_per_s:.2f} tok/s, {gain:+.0%} against the plan{why}", markup=False)
    output.print(", ".join(f"{name}={value}" for name, value in found.settings.items()), markup=False)
    output.print(found.placement)
    if found.file is None:
        output.print("not kept: an earlier run found faster ones, or the cache folder cannot be written")
    else:
        output.print(f'kept in {found.file} for Model(path, offload="tuned")', markup=False, soft_wrap=True)


def _tuned(found: Tuned) -> dict[str, Any]:
    return {
        "trials": [asdict(trial) for trial in found.trials],
        "tokens_per_s": found.tokens_per_s,
        "planned_tokens_per_s": found.planned_tokens_per_s,
        "settings": found.settings,
        "placement": found.placement.to_dict(),
        "stopped": found.stopped,
        "file": None if found.file is None else str(found.file),
    }


@app.command(epilog=EXIT_CODES)
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A GGUF file, or hf:OWNER/REPOSITORY/FILE.gguf.", show_default=False),
    ] = None,
    n_threads: Annotated[int | None, typer.Option("--threads", help="CPU threads; default: physical cores.")] = None,
    load_mode: Annotated[str, typer.Option(help="mmap, read, mlock, mmap+mlock or direct-io.")] = "mmap",
    as_json: Json = False,
) -> None:
    """Say what would make decoding slow here, MODEL's in particular, and what to do; nothing is loaded."""
    _set_up(verbose=False)
    with _one_line_errors():
        header = None if model is None else overspill.ModelInfo.from_file(resolve(model))
        found = examine(header, n_threads=n_threads, load_mode=cast(LoadMode, load_mode))
        if as_json:
            print(json.dumps([asdict(finding) for finding in found], indent=2))
            return
        table = _table("", "")
        table.show_header = False
        for finding in found:
            style = {"bad": "bold red", "warning": "yellow", "fine": "green"}[finding.severity]
            said = Text.assemble((finding.title, "bold"), f"\n{finding.reading}")
            if finding.advice:
                said.append(f"\n→ {finding.advice}")
            table.add_row(Text(finding.severity, style), said)
        _output().print(table)


@app.command(epilog=EXIT_CODES)
def serve_device(
    host: Annotated[str, typer.Option(help="The address to listen at, a name or IPv4.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 50052,
    n_threads: Annotated[
        int | None, typer.Option("--threads", min=1, max=512, help="CPU threads; default: physical cores.")
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="A device to offer; may be repeated. Default: the GPUs, or else the CPU.")
    ] = None,
) -> None:
    """Offer this machine's devices to `overspill run --rpc` on another one, until Ctrl-C.

    It works for one process at a time. Whoever reaches the port can use it and read what is computed: the protocol
    has no authentication and no encryption.
    """
    _set_up(verbose=False)
    with _one_line_errors():
        try:
            serve(host, port, n_threads, device or (), lambda line: errors.print(line, markup=False, soft_wrap=True))
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


@app.command(epilog=EXIT_CODES)
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file, or hf:OWNER/REPOSITORY/FILE.gguf.")],
    vram: Annotated[
        list[str] | None,
        typer.Option(help="Memory of a GPU, such as 24GiB; repeat it for several. Without --ram: of the GPUs here."),
    ] = None,
    ram: Annotated[
        str | None,
        typer.Option(help="Memory of the host, such as 128GiB. Given, hardware is planned for that is not here."),
    ] = None,
    gpu_bandwidth: Annotated[
        list[str] | None, typer.Option(help="Of each GPU, such as 936GB/s.", show_default="936GB/s")
    ] = None,
    ram_bandwidth: Annotated[
        str | None, typer.Option(help="Of the host's memory, such as 47GB/s.", show_default="47GB/s")
    ] = None,
    link: Annotated[
        list[str] | None, typer.Option(help="Between host and GPU, such as 25GB/s.", show_default="25GB/s")
    ] = None,
    n_ctx: Annotated[int | None, typer.Option("--ctx", help="Tokens of prompt and reply together.")] = None,
    depth: Annotated[
        int | None, typer.Option(help="Tokens in the context while it decodes.", show_default="half of --ctx")
    ] = None,
    n_ubatch: Annotated[int, typer.Option("--ubatch", help="Tokens of a prompt that are computed at once.")] = 512,
    type_k: Annotated[str, typer.Option(help="What keys are stored as: f16, q8_0, ...")] = "f16",
    type_v: Annotated[str, typer.Option(help="What values are stored as.")] = "f16",
    pin: Annotated[
        list[str] | None,
        typer.Option(help='What is decided already, such as "experts=cpu" or "layers 0-9 attention=gpu".'),
    ] = None,
    rpc: Annotated[
        list[str] | None, typer.Option(metavar="HOST:PORT", help="Use the devices of overspill serve-device there.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write the placement to a file, for overspill run --offload.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what lies best on which device, how fast it will be, and why; nothing is loaded."""
    _set_up(verbose=False)
    with _one_line_errors():
        for size in vram or ():
            parse_bytes("--vram", size)  # a missing unit is the likelier mistake than a missing GPU
        header = overspill.ModelInfo.from_file(resolve(model))
        if ram is None and (gpu_bandwidth or ram_bandwidth or link):
            raise ValueError(
                "--gpu-bandwidth, --ram-bandwidth and --link are of hardware that is not here: give --ram, too"
            )
        if ram is not None:
            hardware = overspill.Hardware.given(
                ram=ram,
                vram=vram or 0,
                gpu_bandwidth=gpu_bandwidth or None,
                ram_bandwidth=ram_bandwidth,
                link=link or None,
            )
        else:
            for endpoint in rpc or ():
                overspill.add_rpc_server(endpoint)
            gpus = [device for device in overspill.devices() if device.is_gpu]
            if len(vram or ()) > len(gpus):
                raise ValueError(
                    f"--vram is given {len(vram or ())} times, and there are {len(gpus)} GPUs here; "
                    "with --ram, too, it is planned for hardware that is not here"
                )
            memory = {gpu.name: size for gpu, size in zip(gpus, vram or (), strict=False)}
            hardware = _measured(header, memory)
        settings: dict[str, Any] = {
            "n_ctx": n_ctx,
            "depth": depth,
            "n_ubatch": n_ubatch,
            "type_k": type_k,
            "type_v": type_v,
        }
        pins = dict(_pair("--pin", 'like "experts=cpu"', text) for text in pin or ())
        planned = overspill.plan(header, hardware=hardware, pins=pins, **settings)
        if save is not None:
            planned.save(save)
        _print_plan(planned, pins, settings, as_json)


def _measured(header: overspill.ModelInfo, memory: dict[str, str]) -> overspill.Hardware:
    with _bar("measuring") as show:
        return overspill.Hardware.here(
            header, memory=memory, progress=lambda what, share: show(f"measuring {what}", share)
        )


def _print_plan(planned: overspill.Plan, pins: dict[str, str], settings: dict[str, Any], as_json: bool) -> None:
    expected = planned.forecast()
    used = expected.settings
    flags = planned.server_flags(n_ctx=used.n_ctx, n_ubatch=used.n_ubatch, type_k=used.type_k, type_v=used.type_v)
    trades = overspill.ubatch_trade(planned.info, hardware=planned.hardware, pins=pins, **settings)
    if as_json:
        data = {
            "forecast": expected.to_dict(),
            "whole_layers_tokens_per_s": planned.whole_layers_tokens_per_s,
            "hardware": planned.hardware.to_dict(),
            "placement": planned.to_dict(),
            "ubatch_trade": [
                asdict(trade) | {"prefill_ceiling_tokens_per_s": _or_none(trade.prefill_ceiling_tokens_per_s)}
                for trade in trades
            ],
            "llama_server_flags": flags,
        }
        print(json.dumps(data, indent=2))
        return
    output = _output()
    output.print(f"{expected.verdict}: about {expected.tokens_per_s:.1f} tokens/s", style="bold", markup=False)
    output.print(expected.reason, markup=False)
    if planned.whole_layers_tokens_per_s:
        output.print(f"The best split by whole layers: {planned.whole_layers_tokens_per_s:.1f} tokens/s.", markup=False)
    for remedy in expected.remedies:
        output.print(f"- {remedy}", markup=False)
    output.print()
    output.print(overspill.Placement.__rich__(planned))
    memory = _table("device", "weights", "KV cache", "computing", "left free", "of", "ms per token")
    for name, use in expected.memory.items():
        milliseconds = 1e3 * sum(expected.seconds_by_term.get(name, {}).values())
        sizes = (use.weights_bytes, use.kv_bytes, use.compute_bytes, use.free_bytes - use.total_bytes, use.free_bytes)
        memory.add_row(name, *(_size(n) if n >= 0 else f"-{_size(-n)}" for n in sizes), f"{milliseconds:.1f}")
    output.print()
    output.print(memory)
    if planned.hardware.gpus:
        trade = _table(
            "ubatch", "computing", "layers with experts on a GPU" if planned.info.n_experts else "layers on a GPU"
        )
        trade.add_column("tokens/s", justify="right")
        trade.add_column("prompt tokens/s, at most", justify="right")
        for one in trades:
            ceiling = _or_none(one.prefill_ceiling_tokens_per_s)
            trade.add_row(
                str(one.n_ubatch),
                _size(one.compute_bytes),
                str(one.expert_layers),
                f"{one.tokens_per_s:.1f}",
                "–" if ceiling is None else f"{ceiling:.0f}",
            )
        output.print()
        output.print(trade)
    output.print()
    output.print("llama-server " + shlex.join(flags), markup=False, soft_wrap=True)
    if planned.hardware.source == "assumed":
        output.print("Some figures of the hardware are assumed; see docs/offload.md.", style="dim", markup=False)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _print_version(wanted: bool) -> None:
    if wanted:
        backends = ", ".join(["CPU", "RPC", *_core.GPU_BACKENDS])
        print(f"overspill {overspill.__version__}, llama.cpp {_core.LLAMA_CPP_COMMIT}, backends: {backends}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    app()
