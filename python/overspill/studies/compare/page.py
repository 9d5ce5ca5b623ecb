"""A comparison as one HTML page that loads nothing from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import jinja2

from overspill._core import LLAMA_CPP_COMMIT
from overspill.base.units import format_bytes, format_count
from overspill.base.values import StopReason
from overspill.placement.device_names import CPU, memory_name
from overspill.studies.compare.answers import NO_CHAT, Answer, ComparedModel
from overspill.studies.compare.bars import memory_bars, speed_bars, wait_bars
from overspill.studies.compare.markdown import render_markdown
from overspill.studies.compare.placement_map import placement_map

__all__ = ["html_page"]

_STOPS = {
    StopReason.EOS: "ended by itself",
    StopReason.STOP_STRING: "ended by a stop string",
    StopReason.MAX_TOKENS: "cut off at --max-tokens",
    StopReason.CONTEXT_FULL: "cut off: context full",
    StopReason.INTERRUPTED: "interrupted",
    StopReason.CLOSED: "interrupted",
    StopReason.ERROR: "ended by an error",
}
# A font for Chinese is not one for Japanese: the page says which it is, as far as the text does.
_SCRIPTS = (
    ("ja", re.compile(r"[\u3041-\u30ff]")),
    ("ko", re.compile(r"[\uac00-\ud7a3]")),
    ("zh", re.compile(r"[\u4e00-\u9fff]")),
)


def _stats(one: ComparedModel, answer: Answer) -> list[tuple[str, bool]]:
    """Return the facts of an answer's stats, each with whether the page points it out."""
    stats = answer.stats
    if stats is None:
        return []
    speed, first = stats.tokens_per_second, stats.time_to_first_token_s
    facts = [
        ("– tok/s" if speed is None else f"{speed:.2f} tok/s", False),
        (format_count(stats.tokens, "token"), False),
        ("no first token" if first is None else f"{first:.2f} s to first token", False),
        (f"{stats.prefill_s + stats.decode_s:.1f} s in all", False),
    ]
    if stats.stop_reason is not None:
        facts.append((_STOPS[stats.stop_reason], stats.stop_reason not in (StopReason.EOS, StopReason.STOP_STRING)))
    if one.chats is False:
        facts.append((NO_CHAT, True))
    return facts


def _language(text: str) -> str:
    return next((language for language, script in _SCRIPTS if script.search(text)), "")


def _without_folder(text: str, models: Sequence[ComparedModel]) -> str:
    """Return an error without the models' folders, which are the author's business."""
    for one in models:
        text = text.replace(str(one.path), one.path.name)
    return text


def _rows_of_settings(
    models: Sequence[ComparedModel], settings: Mapping[str, Any], *, together: bool
) -> list[tuple[str, str]]:
    """Return names and values: what was given, how models were loaded, the devices, and the versions."""
    names = {"n_ctx": "context", "n_threads": "threads", "n_batch": "batch", "load_mode": "load mode"}
    given = [
        (
            names.get(name, name.replace("_", " ")),
            ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value),
        )
        for name, value in settings.items()
        if value not in (None, {}, (), []) and name != "system" and (name, value) != ("thinking", True)
    ]
    loaded = (
        "all at once, and answered question by question"
        if together
        else "one after the other, since they do not all fit into memory at once"
    )
    devices = {spec.name: spec for one in models for spec in one.hardware.devices}
    found = [
        (
            _computing_name(name),
            " · ".join(part for part in (spec.description, format_bytes(spec.memory_bytes) + " free") if part),
        )
        for name, spec in devices.items()
    ]
    made = f"overspill {version('overspill')}, llama.cpp {LLAMA_CPP_COMMIT}"
    return [*given, ("loaded", loaded), *found, ("made with", made)]


def _computing_name(device: str) -> str:
    """Return a device's name where it stands for its cores and for its memory."""
    return "CPU and RAM" if device == CPU else device


def _colours(devices: Sequence[str]) -> dict[str, str]:
    """Return the CSS class of each device and chart; a device has the same one for all models."""
    gpus = [device for device in devices if device != CPU]
    return {"speed": "speed", "wait": "wait", CPU: "cpu"} | {gpu: f"gpu{i % 4}" for i, gpu in enumerate(gpus)}


def html_page(
    questions: Sequence[str],
    models: Sequence[ComparedModel],
    settings: Mapping[str, Any],
    *,
    together: bool,
    began: datetime,
    sentences: Sequence[str],
    problems: Sequence[str],
) -> str:
    """Return one page that shows a comparison, with nothing to be loaded from elsewhere.

    Parameters
    ----------
    questions, models, settings, together, began
        As of :class:`overspill.Comparison`.
    sentences
        The summary.
    problems
        What went wrong, one line each; the models' folders are left out of them.
    """
    used = {device for one in models for device in (*one.memory, *one.placement.devices_used)}
    order = {spec.name: None for one in models for spec in one.hardware.devices if spec.name != CPU} | {CPU: None}
    devices = [device for device in order if device in used]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(
        files("overspill.studies.compare").joinpath("page.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        questions=questions,
        models=models,
        title=" ".join(questions[0].split())
        if len(questions) == 1
        else f"{len(questions)} questions to {len(models)} models",
        began=began,
        sentences=sentences,
        problems=[_without_folder(problem, models) for problem in problems],
        speeds=speed_bars(models),
        waits=wait_bars(models),
        memory={
            device: memory_bars(models, device) for device in devices if any(device in one.memory for one in models)
        },
        maps=[placement_map(one) for one in models],
        system=settings["system"],
        settings=_rows_of_settings(models, settings, together=together),
        colours=_colours(devices),
        computing_name=_computing_name,
        memory_name=memory_name,
        format_bytes=format_bytes,
        stats=_stats,
        markdown=render_markdown,
        language=_language,
        sampling=lambda one: "" if one.sampling is None else str(replace(one.sampling, seed=None)),
        plain=lambda text: _without_folder(text, models),
    )
