"""``overspill tune``: the fastest settings, found by measuring."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from overspill.base.tables import plain_table
from overspill.base.values import CacheType
from overspill.cli.exits import INTERRUPTED, guarded_command
from overspill.cli.options import Json, LoadOptions, ModelFile, loads_a_model
from overspill.cli.output import errors, report_output
from overspill.planning.settings import PROMPT_TOKENS, REPLY_TOKENS
from overspill.studies.tune import Trial, Tuned
from overspill.studies.tune import tune as find_fastest

__all__ = ["tune"]


_TRIED = ["offload", "experts", "n_batch", "n_ubatch", "n_threads", "type_k", "type_v", "flash_attention", "load_mode"]


@loads_a_model(without=[*_TRIED, "prompt_cache"])
def tune(
    model: ModelFile,
    kv_type: Annotated[
        list[str] | None,
        typer.Option(help="Try this type of the KV cache too, such as q8_0; may be repeated. It may change replies."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt that counts beside a GPU.")] = PROMPT_TOKENS,
    reply_tokens: Annotated[int, typer.Option(help="Tokens of the reply that counts.")] = REPLY_TOKENS,
    *,
    loading: LoadOptions,
    seconds: Annotated[float | None, typer.Option(help="Start no trial after so many seconds.")] = None,
    as_json: Json = False,
) -> None:
    """Measure which settings are fastest for MODEL here, and keep them for Model(path, offload="tuned").

    The search starts from the plan. Ctrl-C ends it and keeps the best settings so far.
    """
    with guarded_command():
        console = errors if as_json else report_output()
        with _Trials(console, quiet=as_json and not console.is_terminal) as trials:
            found = find_fastest(
                loading.model(model),
                allow_kv_types=cast("list[CacheType]", kv_type or []),
                prompt_tokens=prompt_tokens,
                reply_tokens=reply_tokens,
                seconds=seconds,
                report=trials.report,
                **loading.given(),
            )
        if as_json:
            print(json.dumps(_tuned(found), indent=2))
        else:
            _print_tuned(found)
    if found.stopped == "interrupted":
        raise typer.Exit(INTERRUPTED)


class _Trials:
    """Shows trials: in a terminal as a table that grows, elsewhere as lines."""

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
        """Show the beginning or the outcome of a trial."""
        if self._trials and self._trials[-1].state == "measuring":
            self._trials.pop()
        self._trials.append(trial)
        if self._console.is_terminal:
            self._live.refresh()
        elif trial.state != "measuring" and not self._quiet:
            self._console.print(*_row(trial), trial.problem, soft_wrap=True)

    def _render(self) -> Table:
        table = plain_table("setting", "value", "tok/s", "in prompts", "", left=("setting", "value"))
        for trial in self._trials:
            table.add_row(*_row(trial), style="bold" if trial.state == "kept" else None)
        return table


def _row(trial: Trial) -> tuple[str, str, str, str, str]:
    speed = "–" if trial.tokens_per_s is None else f"{trial.tokens_per_s:.2f}"
    prompts = "–" if trial.prompt_tokens_per_s is None else f"{trial.prompt_tokens_per_s:.1f}"
    return trial.setting, trial.value, speed, prompts, f"{trial.state}{'…' if trial.state == 'measuring' else ''}"


def _print_tuned(found: Tuned) -> None:
    output = report_output()
    why = f" ({found.stopped}: not everything was tried)" if found.stopped else ""
    gain = found.tokens_per_s / found.planned_tokens_per_s - 1
    output.print(f"\nbest: {found.tokens_per_s:.2f} tok/s, {gain:+.0%} against the plan{why}")
    if found.prompt_tokens_per_s and found.planned_prompt_tokens_per_s:
        gain = found.prompt_tokens_per_s / found.planned_prompt_tokens_per_s - 1
        output.print(f"prompts: {found.prompt_tokens_per_s:.1f} tok/s, {gain:+.0%}")
    output.print(", ".join(f"{name}={value}" for name, value in found.settings.items()))
    output.print(found.placement)
    if found.file is None:
        output.print("not kept: an earlier run found faster ones, or the cache folder cannot be written")
    else:
        output.print(f'kept in {found.file} for Model(path, offload="tuned")', soft_wrap=True)


def _tuned(found: Tuned) -> dict[str, Any]:
    return {
        "trials": [asdict(trial) for trial in found.trials],
        "tokens_per_s": found.tokens_per_s,
        "planned_tokens_per_s": found.planned_tokens_per_s,
        "prompt_tokens_per_s": found.prompt_tokens_per_s,
        "planned_prompt_tokens_per_s": found.planned_prompt_tokens_per_s,
        "settings": found.settings,
        "placement": found.placement.to_dict(),
        "stopped": found.stopped,
        "file": None if found.file is None else str(found.file),
    }
