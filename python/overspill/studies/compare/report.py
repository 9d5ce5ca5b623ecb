"""A comparison as one HTML page that loads nothing from elsewhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import groupby

import jinja2
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from markupsafe import Markup

import overspill
from overspill import _core
from overspill.base.units import format_bytes
from overspill.base.values import StopReason
from overspill.header.tensor_names import layer_of, part_of
from overspill.placement.device_names import CPU
from overspill.placement.outline import PARTS
from overspill.studies.compare.comparison import Answer, ComparedModel, Comparison
from overspill.studies.compare.view import NO_CHAT

__all__ = ["html_report"]

_LINK = re.compile(r"(https?|mailto):", re.IGNORECASE)
_PART_NAMES = {"kv": "KV cache"}
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


# --- Markdown of models


def _image(renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
    """Render an image as a link: loading it would tell its server who reads the page, and when."""
    token = tokens[index]
    text = escapeHtml(renderer.renderInlineAsText(token.children or [], options, env) or str(token.attrs["src"]))
    return f'<a href="{escapeHtml(str(token.attrs["src"]))}" rel="noopener noreferrer nofollow">image: {text}</a>'


def _markdown() -> MarkdownIt:
    markdown = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    markdown.validateLink = lambda url: _LINK.match(url) is not None  # type: ignore[method-assign]
    markdown.add_render_rule("image", _image)
    return markdown


_MARKDOWN = _markdown()


def render_markdown(text: str) -> Markup:
    """Return a model's Markdown as HTML: what is HTML in it becomes text, links are of the web or of mail."""
    tokens = _MARKDOWN.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + 3)}"  # below those of the page
        for child in token.children or []:
            if child.type == "link_open":
                child.attrSet("rel", "noopener noreferrer nofollow")
    return Markup(_MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {}))


# --- what the page shows


@dataclass(frozen=True, slots=True)
class _Rectangle:
    """A piece of the map, in layers to the right and rows down."""

    x: float
    y: float
    width: float
    height: float
    device: str
    title: str


@dataclass(frozen=True, slots=True)
class _Map:
    rows: list[tuple[str, str]]
    """Labels, and sizes."""
    rectangles: list[_Rectangle]
    n_layers: int
    description: str
    totals: list[tuple[str, str]]
    """Devices, and bytes on them."""


def _runs(devices: Sequence[str]) -> str:
    """Return where layers are: ``0-9 on CUDA0, 10-35 on CPU``."""
    texts = []
    for device, run in groupby(enumerate(devices), key=lambda entry: entry[1]):
        numbers = [number for number, _ in run]
        texts.append(f"{numbers[0]}-{numbers[-1]} on {device}")
    return ", ".join(texts)


def _map(one: ComparedModel) -> _Map:
    placement, info = one.placement, one.info
    located = placement.tensors()
    layers: dict[str, list[Counter[str]]] = {part: [Counter() for _ in range(placement.n_layers)] for part in PARTS}
    whole: dict[str, Counter[str]] = {"embedding": Counter(), "output": Counter()}
    for name, _, _, n_bytes in info.tensors:
        part, layer = part_of(name), layer_of(name)
        if layer is not None and layer < placement.n_layers and part in layers:
            layers[part][layer][located[name]] += n_bytes
        elif part in whole:
            whole[part][located[name]] += n_bytes
    shared = info.tied_embedding and placement.output_matrix == placement.embedding
    if info.tied_embedding and not shared:
        whole["output"][placement.output_matrix] += sum(whole["embedding"].values())  # a copy
    for layer, device in enumerate(placement.kv):
        sizes = placement.kv_bytes_by_layer
        layers["kv"][layer][device] = 0 if sizes is None else sizes[layer]
    width = placement.n_layers
    rows: list[tuple[str, list[tuple[float, float, str, Counter[str]]]]] = [
        ("embedding, output" if shared else "embedding", [(0, width, "embedding", whole["embedding"])])
    ]
    for kind, cells in layers.items():
        if any(cells):
            label = _PART_NAMES.get(kind, kind)
            rows.append((label, [(i, 0.88, f"layer {i}, {label}", cell) for i, cell in enumerate(cells) if cell]))
    if not shared:
        rows.append(("output", [(0, width, "output", whole["output"])]))
    rectangles = [
        piece
        for y, (_, cells) in enumerate(rows)
        for x, cell_width, title, sizes in cells
        for piece in _pieces(x, y, cell_width, title, sizes)
    ]
    said = [
        f"{label}: {_runs([' and '.join(sizes) for *_, sizes in cells])}"
        if len(cells) > 1
        else f"{label} on {' and '.join(cells[0][3])}"
        for label, cells in rows
    ]
    labels = [(label, format_bytes(sum(sum(sizes.values()) for *_, sizes in cells))) for label, cells in rows]
    totals = [(device, format_bytes(n_bytes)) for device, n_bytes in placement.bytes_by_device().items() if n_bytes]
    return _Map(labels, rectangles, width, "; ".join(said), totals)


def _pieces(x: float, y: float, width: float, title: str, sizes: Mapping[str, int]) -> Iterable[_Rectangle]:
    """Divide a cell among the devices that it lies on."""
    total, top = sum(sizes.values()), y + 0.08
    for device, n_bytes in sizes.items():
        height = 0.84 * (n_bytes / total if total else 1 / len(sizes))
        text = f"{title}: {device}" + (f", {format_bytes(n_bytes)}" if n_bytes else "")
        yield _Rectangle(x, round(top, 4), width, round(height, 4), device, text)
        top += height


@dataclass(frozen=True, slots=True)
class _Bar:
    """One line of a chart; shares are of its whole width, 0 to 1."""

    label: str
    value: str
    shares: list[tuple[float, str, str]]
    """Share, what it is of (the class of its colour), and how it is shaded."""
    note: str = ""


def _speed_bars(models: Sequence[ComparedModel]) -> list[_Bar]:
    speeds = [one.tokens_per_second for one in models]
    most = max((speed for speed in speeds if speed is not None), default=1.0)
    return [
        _Bar(
            one.label,
            "–" if speed is None else f"{speed:.2f} tok/s",
            [((speed or 0) / most, "speed", "weights")],
            f"{one.forecast.tokens_per_s:.1f} were expected" if one.hardware.source == "measured" else "",
        )
        for one, speed in zip(models, speeds, strict=True)
    ]


def _wait_bars(models: Sequence[ComparedModel]) -> list[_Bar]:
    times = [one.time_to_first_token_s for one in models]
    most = max((seconds for seconds in times if seconds is not None), default=1.0) or 1.0
    return [
        _Bar(one.label, "–" if seconds is None else f"{seconds:.2f} s", [((seconds or 0) / most, "wait", "weights")])
        for one, seconds in zip(models, times, strict=True)
    ]


def _memory_bars(models: Sequence[ComparedModel], device: str) -> list[_Bar]:
    bars = []
    for one in models:
        use = one.memory.get(device)
        room = next((spec.memory_bytes for spec in one.hardware.devices if spec.name == device), 0)
        if use is None or not use.total_bytes:
            bars.append(_Bar(one.label, "–" if not one.memory else "nothing", []))
            continue
        whole = max(room, use.total_bytes)
        kinds = {"weights": use.weights_bytes, "kv": use.kv_bytes, "compute": use.compute_bytes}
        shares = [(n_bytes / whole, device, kind) for kind, n_bytes in kinds.items()]
        note = " · ".join(
            f"{name} {format_bytes(n_bytes)}"
            for name, n_bytes in zip(("weights", "KV cache", "computing"), kinds.values(), strict=True)
            if n_bytes
        )
        value = format_bytes(use.total_bytes) + (f" of {format_bytes(room)}" if room else "")
        bars.append(_Bar(one.label, value, shares, note))
    return bars


def _stats(one: ComparedModel, answer: Answer) -> list[tuple[str, bool]]:
    """Return what the stats say, and whether it is something to mind."""
    stats = answer.stats
    if stats is None:
        return []
    speed, first = stats.tokens_per_second, stats.time_to_first_token_s
    facts = [
        ("– tok/s" if speed is None else f"{speed:.2f} tok/s", False),
        (f"{stats.tokens} token{'' if stats.tokens == 1 else 's'}", False),
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
    """Leave out of an error where the reader's colleague keeps files."""
    for one in models:
        text = text.replace(str(one.path), one.path.name)
    return text


def _settings(comparison: Comparison) -> list[tuple[str, str]]:
    names = {"n_ctx": "context", "n_threads": "threads", "n_batch": "batch", "load_mode": "load mode"}
    given = [
        (
            names.get(name, name.replace("_", " ")),
            ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value),
        )
        for name, value in comparison.settings.items()
        if value not in (None, {}, (), []) and name != "system" and (name, value) != ("thinking", True)
    ]
    loaded = (
        "all at once, and answered question by question"
        if comparison.together
        else "one after the other, since they do not all fit into memory at once"
    )
    devices = {spec.name: spec for one in comparison.models for spec in one.hardware.devices}
    found = [
        (
            _place(name),
            " · ".join(part for part in (spec.description, format_bytes(spec.memory_bytes) + " free") if part),
        )
        for name, spec in devices.items()
    ]
    made = f"overspill {overspill.__version__}, llama.cpp {_core.LLAMA_CPP_COMMIT}"
    return [*given, ("loaded", loaded), *found, ("made with", made)]


def _place(device: str) -> str:
    return "CPU and RAM" if device == CPU else device


def _colours(devices: Sequence[str]) -> dict[str, str]:
    """Return the class of each device's colour, which is the same for all models."""
    gpus = [device for device in devices if device != CPU]
    return {"speed": "speed", "wait": "wait", CPU: "cpu"} | {gpu: f"gpu{i % 4}" for i, gpu in enumerate(gpus)}


def html_report(comparison: Comparison) -> str:
    """Return the page."""
    models = comparison.models
    used = {device for one in models for device in (*one.memory, *one.placement.devices_used)}
    order = {spec.name: None for one in models for spec in one.hardware.devices if spec.name != CPU} | {CPU: None}
    devices = [device for device in order if device in used]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(
        files("overspill.studies.compare").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        comparison=comparison,
        models=models,
        title=" ".join(comparison.questions[0].split())
        if len(comparison.questions) == 1
        else f"{len(comparison.questions)} questions to {len(models)} models",
        problems=[_without_folder(problem, models) for problem in comparison.problems],
        speeds=_speed_bars(models),
        waits=_wait_bars(models),
        memory={
            device: _memory_bars(models, device) for device in devices if any(device in one.memory for one in models)
        },
        maps=[_map(one) for one in models],
        settings=_settings(comparison),
        colours=_colours(devices),
        place=_place,
        format_bytes=format_bytes,
        stats=_stats,
        markdown=render_markdown,
        language=_language,
        sampling=lambda one: "" if one.sampling is None else str(replace(one.sampling, seed=None)),
        plain=lambda text: _without_folder(text, models),
    )
