"""The command line. Text goes to standard output; everything about it to standard error."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

import overspill
from overspill._core import GPU_BACKENDS, LLAMA_CPP_COMMIT
from overspill.base.text import printable
from overspill.cli.bench import bench
from overspill.cli.chat import chat
from overspill.cli.compare import compare
from overspill.cli.devices import devices
from overspill.cli.doctor import doctor
from overspill.cli.exits import EXIT_CODES, INTERRUPTED, USAGE
from overspill.cli.experts import experts
from overspill.cli.info import info
from overspill.cli.list import list as list_models
from overspill.cli.output import errors
from overspill.cli.plan import plan
from overspill.cli.pull import pull
from overspill.cli.run import run
from overspill.cli.serve import serve
from overspill.cli.serve_device import serve_device
from overspill.cli.tune import tune

__all__ = ["main"]


app = typer.Typer(
    help="Run language models bigger than your GPU.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
)
# In the order of the help, which has room for so much of each at 80 columns.
COMMANDS: dict[Callable[..., None], str] = {
    run: "Answer a prompt, or continue a text.",
    chat: "Talk with a model in the terminal.",
    list_models: "List the models on this disk.",
    pull: "Download a model from the Hugging Face hub.",
    plan: "Plan what goes to which device, and how fast it will be.",
    compare: "Ask models the same question, side by side.",
    info: "Show a model's layers, sizes and sampling.",
    devices: "List the devices that models can run on.",
    tune: "Measure which settings are fastest, and keep them.",
    bench: "Measure how fast a model reads and decodes.",
    experts: "Show which experts a model uses.",
    doctor: "Find causes of slow decoding.",
    serve: "Answer requests of OpenAI's API.",
    serve_device: "Offer this machine's devices to another one.",
}
for command, summary in COMMANDS.items():
    app.command(epilog=EXIT_CODES, short_help=summary)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        backends = ", ".join(["CPU", "RPC", *GPU_BACKENDS])
        print(f"overspill {overspill.__version__}, llama.cpp {LLAMA_CPP_COMMIT}, backends: {backends}")
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
    try:
        code = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):  # Ctrl-C before or after a command
        errors.print("error: interrupted")
        code = INTERRUPTED
    except Exception as error:
        # The parser's errors quote the arguments; which package they are of depends on typer's version.
        show: Any = getattr(error, "show", None)
        if show is None:
            raise
        said = io.StringIO()
        show(said)
        sys.stderr.write(printable(said.getvalue()))
        code = getattr(error, "exit_code", USAGE)
    sys.exit(code)
