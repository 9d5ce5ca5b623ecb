"""Results as people look at them and send them on: in notebooks, in one line, and through pickle."""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, fromstring

import numpy as np
import pytest

import overspill
from header_files import write_header
from overspill import (
    Bench,
    Comparison,
    Completion,
    ExpertReplay,
    ExpertTrace,
    Hardware,
    Model,
    ModelInfo,
    Placement,
    Plan,
    Sampler,
    SamplingOptions,
    plan,
)
from overspill.base.units import format_bytes

pytestmark = pytest.mark.usefixtures("no_gpu")

SHOWN = ("Bench", "ChatReply", "Comparison", "Completion", "ExpertStudy", "Hardware", "ModelInfo", "Placement", "Plan")
"""Classes with a form for notebooks."""
HOSTILE = "<script>alert('1')</script>&amp;\n\x1b[2J\u202e" + "x" * 300
SHOWN_HOSTILE = "<script>alert('1')</script>&amp;"
USES = ("attention", "experts", "other weights", "KV cache", "compute buffers", "cache of experts", "free")


def is_value(thing: object) -> bool:
    """Tell whether it is a class of values that a caller gets, and may keep."""
    return isinstance(thing, type) and (is_dataclass(thing) or thing in (Placement, Plan, Sampler, overspill.Token))


VALUES = sorted(name for name in overspill.__all__ if is_value(getattr(overspill, name)))


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelInfo]:
    """Return a function that gives a large model's header."""

    def read(name: str) -> ModelInfo:
        path = tmp_path_factory.mktemp("headers") / f"{name}.gguf"
        write_header(path, name)
        return ModelInfo.from_file(path)

    return read


@pytest.fixture(scope="module")
def values(tiny_gpt_oss_path: Path, header: Callable[[str], ModelInfo]) -> dict[str, Any]:
    """Return a value of each class of ``VALUES``, most of them of a model that ran, by the class's name."""
    with Model(tiny_gpt_oss_path, n_ctx=128, n_threads=1) as model:
        completion = model.generate("x", max_tokens=4, logprobs=2, seed=1)
        memory = model.memory["CPU"]
    trace = overspill.trace_experts(tiny_gpt_oss_path, ["x"], max_tokens=8)
    info, hardware = header("gpt-oss-20b"), Hardware.given(ram="64GiB", vram=["8GiB", "6GiB"])
    planned = plan(info, hardware=hardware, experts="cached")
    bench = overspill.bench(tiny_gpt_oss_path, n_prompt=16, n_gen=4, repetitions=2, n_threads=1)
    comparison = overspill.compare([tiny_gpt_oss_path] * 2, ["x", "y"], n_ctx=128, n_threads=1, max_tokens=4)
    small = ModelInfo.from_file(tiny_gpt_oss_path)
    study = overspill.replay_experts(trace, resident=(0.25, 0.5), tokens="all")
    trial = overspill.Trial("n_threads", "2", "kept", 12.5)
    message = {"role": "assistant", "content": "a"}
    call = overspill.ToolCall("f", {"a": [1]}, "1")
    found = [
        comparison.models[0].answers[0],
        bench,
        completion.stats.breakdown,
        overspill.CascadeStats("small", "it was sure", completion.stats, None, 0.5),
        overspill.CascadeToken(completion.tokens[0], "small"),
        overspill.ChatReply("a", "", (call,), message, completion.stats),
        overspill.ChatToken(1, "a", overspill.Channel.FINAL, tool_call=call),
        comparison.models[0],
        comparison,
        completion,
        overspill.devices()[-1],
        hardware.gpus[0],
        overspill.Draft("a", message, completion.stats),
        overspill.plan_expert_cache(info, hardware),
        planned.forecast().experts,
        study.replays[0],
        overspill.ExpertStats(8, 4, 1, 10, 20, 3, 4, 32, is_off=False),
        study,
        trace,
        planned.forecast(),
        hardware,
        planned.llama_arguments(),
        memory,
        info,
        Placement.from_mapping(small, ["CUDA0"], {"default": "CUDA0", "experts": "cpu"}),
        planned,
        Sampler(seed=1, repeat_penalty=1.1),
        SamplingOptions(temperature=0.5, logit_bias={1: 2.0}),
        completion.stats,
        completion.tokens[0],
        call,
        trial,
        overspill.Tuned((trial,), planned, {"n_threads": 2}, 12.5, 10.0, None, None),
    ]
    return {type(value).__name__: value for value in found}


def test_the_values_are_of_every_class(values: dict[str, Any]) -> None:
    """A new class of values is looked at here as well."""
    assert sorted(values) == VALUES


# --- notebooks


def parsed(value: Any) -> Element:
    """Return a value's HTML, read by an XML parser, and checked for all that runs or is loaded from elsewhere."""
    shown = value._repr_html_()
    page = fromstring(f"<div>{shown.replace('<br>', '<br/>')}</div>")
    for element in page.iter():
        assert element.tag in {"div", "span", "p", "br", "strong", "code", "table", "caption", "tr", "th", "td"}
        assert set(element.keys()) <= {"style", "title", "colspan", "data-bytes", "data-device"}
        assert "url" not in element.get("style", "")
        # A ground without a colour of its own may have the notebook's text on it, as pale as itself.
        assert ("background:#" in element.get("style", "")) == (
            "color:#" in element.get("style", "").replace("d:#", "")
        )
    return page


def text_of(page: Element) -> str:
    """Return the text of an element, spaces as they are in it."""
    return "".join(page.itertext()).replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize("name", SHOWN)
def test_html_is_well_formed(values: dict[str, Any], name: str) -> None:
    """Of every class that has some."""
    assert text_of(parsed(values[name]))


def test_no_class_with_html_is_left_out() -> None:
    """So that all of it is checked here."""
    assert [name for name in VALUES if hasattr(getattr(overspill, name), "_repr_html_")] == [*SHOWN]


def hostile(info: ModelInfo) -> ModelInfo:
    """Return a header whose names are as bad as a file can make them."""
    names = {"general.name": HOSTILE, "general.license": HOSTILE}
    return replace(info, metadata={**info.metadata, **names}, files=[f"/{HOSTILE}.gguf"])


def test_what_files_and_models_say_is_text(values: dict[str, Any]) -> None:
    """Names, licences, paths, descriptions, questions and answers."""
    info, hardware = hostile(values["ModelInfo"]), values["Hardware"]
    named = Hardware((*hardware.gpus, replace(hardware.cpu, description=HOSTILE)), "given", 2)
    comparison: Comparison = values["Comparison"]
    answers = [replace(answer, text=HOSTILE, question=HOSTILE) for answer in comparison.models[0].answers]
    models = [replace(comparison.models[0], label=HOSTILE, answers=answers)]
    device = replace(hardware.gpus[0], name=HOSTILE)
    for value, n_times in (
        (info, 3),
        (named, 1),
        (plan(info, hardware=Hardware((device, named.cpu), "given", 2)), 10),
        (Placement(info, [HOSTILE]), 1),
        (replace(values["Bench"], info=info), 1),
        (replace(comparison, questions=[HOSTILE] * 2, models=models), 6),
        (replace(values["Completion"], text=HOSTILE), 1),
        (replace(values["ExpertStudy"], trace=replace(values["ExpertTrace"], model=HOSTILE)), 1),
    ):
        said = text_of(parsed(value))
        assert said.count(SHOWN_HOSTILE) >= n_times
        assert not set("\x1b\u202e") & set(said)


def bars(page: Element) -> Iterator[tuple[str, list[Element]]]:
    """Yield the memory of each device: its heading, and the segments of its bar."""
    for device in page.iter("div"):
        if device.get("data-device") is not None:
            yield device.get("data-device") or "", [one for one in device.iter("div") if one.get("data-bytes")]


def sizes_in(segments: list[Element]) -> dict[str, int]:
    """Return the bytes of a bar's segments by what takes them, checked against their labels."""
    sizes = {}
    for one in segments:
        n_bytes, label = int(one.get("data-bytes") or 0), one.get("title") or ""
        (use,) = (use for use in USES if label == f"{use} {format_bytes(n_bytes)}")
        assert use not in sizes
        sizes[use] = n_bytes
    assert [*sizes] == [use for use in USES if use in sizes]
    return sizes


@pytest.mark.parametrize(
    ("name", "ram", "vram", "experts"),
    [
        ("gpt-oss-20b", "64GiB", ["8GiB"], "cached"),
        ("gpt-oss-20b", "64GiB", ["8GiB", "6GiB"], "static"),
        ("gpt-oss-20b", "64GiB", 0, "static"),
        ("gpt-oss-120b", "16GiB", ["8GiB"], "static"),  # too little for it
        ("llama-3-8b", "64GiB", ["24GiB"], "static"),
        ("gemma-3-27b", "64GiB", ["12GiB"], "static"),  # a tied embedding
    ],
)
def test_the_map_adds_up_to_the_forecast(
    header: Callable[[str], ModelInfo], name: str, ram: str, vram: Any, experts: Any
) -> None:
    """Every device is there, what takes its memory adds up to the forecast's bytes, and lengths are to scale."""
    info = header(name)
    planned = plan(info, hardware=Hardware.given(ram=ram, vram=vram), experts=experts)
    found = dict(bars(parsed(planned)))
    memory = planned.forecast().memory
    assert [*found] == [*memory]
    in_all = dict.fromkeys(USES, 0)
    for device, use in memory.items():
        sizes = {**dict.fromkeys(USES, 0), **sizes_in(found[device])}
        assert sizes["KV cache"] == use.kv_bytes
        assert sizes["compute buffers"] == use.compute_bytes
        assert sizes["cache of experts"] == planned.expert_cache.get(device, 0)
        assert sum(sizes[one] for one in ("attention", "experts", "other weights", "cache of experts")) == (
            use.weights_bytes
        )
        assert sizes["free"] == max(0, use.free_bytes - use.total_bytes)
        whole = max(use.free_bytes, use.total_bytes)
        for segment in found[device]:
            (percent,) = re.findall(r"(?<!-)width:([\d.]+)%", segment.get("style") or "")
            assert float(percent) == pytest.approx(100 * int(segment.get("data-bytes") or 0) / whole, abs=1e-3)
        for one, n_bytes in sizes.items():
            in_all[one] += n_bytes
    assert in_all["attention"] == info.bytes_by_part["attention"]
    assert in_all["experts"] == info.bytes_by_part["experts"]
    said = text_of(parsed(planned))
    outlook = planned.forecast()
    assert f"{outlook.tokens_per_s:.1f} tokens/s" in said
    assert f"{outlook.time_to_first_token_s:.2g} s to the first token" in said
    for device, use in memory.items():
        assert f"{'RAM' if device == 'CPU' else device} {format_bytes(use.total_bytes)} of " in said
        assert (f"{format_bytes(use.missing_bytes)} too much" in said) == (use.total_bytes > use.free_bytes)


def test_the_map_of_a_placement_has_one_scale(values: dict[str, Any]) -> None:
    """Nothing is known of devices: the fullest one's bar is the longest, and what is empty is left out."""
    info: ModelInfo = values["ModelInfo"]
    placement = Placement.from_mapping(info, ["CUDA0", "CUDA1"], {"default": "CUDA0", "experts": "cpu"})
    placement.kv_bytes_by_layer = [1 << 20] * info.n_layers
    found = dict(bars(parsed(placement)))
    assert [*found] == ["CUDA0", "CPU"]
    lengths = {
        device: sum(float(re.findall(r"(?<!-)width:([\d.]+)%", one.get("style") or "")[0]) for one in segments)
        for device, segments in found.items()
    }
    on = placement.bytes_by_device()
    assert lengths["CPU"] == pytest.approx(100, abs=1e-2)
    n_bytes = on["CUDA0"] + (info.n_layers << 20)
    assert lengths["CUDA0"] == pytest.approx(100 * n_bytes / on["CPU"], abs=1e-2)
    assert sum(sizes_in(found["CUDA0"]).values()) == n_bytes


def test_a_bench_has_its_tables(values: dict[str, Any]) -> None:
    """With the figures that a terminal gets."""
    bench: Bench = values["Bench"]
    page = parsed(bench)
    rows = [[text_of(cell) for cell in row] for row in page.iter("tr")]
    assert bench.prefill is not None
    for samples in (bench.prefill, bench.decode):
        assert [samples.name, f"{samples.tokens_per_s:.2f}", f"{samples.deviation:.2f}"] in rows
    assert len([*page.iter("table")]) == 4
    assert f"{bench.decode.tokens_per_s:.2f} of the " in text_of(page)


def test_a_comparison_has_speeds_to_scale_and_answers(values: dict[str, Any]) -> None:
    """A row for each model, and one for each question."""
    comparison: Comparison = values["Comparison"]
    page = parsed(comparison)
    models, answers = page.iter("table")
    speeds = [one.tokens_per_second or 0.0 for one in comparison.models]
    lengths = [float(found) for found in re.findall(r";width:([\d.]+)%", comparison._repr_html_())]
    assert lengths == pytest.approx([100 * speed / max(speeds) for speed in speeds], abs=1e-3)
    for row, one, speed in zip([*models][1:], comparison.models, speeds, strict=True):
        assert text_of(row).startswith(f"{one.label}{speed:.2f} tok/s")
    for number, row in enumerate([*answers][1:]):
        said = [one.answers[number].text for one in comparison.models]
        assert len(row) == 1 + len(said)
        assert text_of(row[0]) == comparison.questions[number]


def test_a_completion_keeps_its_lines(values: dict[str, Any]) -> None:
    """The text as it is, and the stats."""
    completion: Completion = replace(values["Completion"], text="a  <b>\n\tc & d\n")
    text, stats = parsed(completion)
    assert text_of(text) == "a  <b>\n\tc & d\n"
    assert "white-space:pre-wrap" in (text.get("style") or "")
    assert text_of(stats) == str(completion.stats)


# --- one line


@pytest.mark.parametrize("name", VALUES)
def test_repr_is_one_short_line(values: dict[str, Any], name: str) -> None:
    """With the class's name in it."""
    said = repr(values[name])
    assert name in said
    assert len(said) <= 200
    assert "\n" not in said


def of_ours(thing: Any, seen: dict[int, Any]) -> dict[int, Any]:
    """Return the objects of our own types that a thing gives by its attributes, itself among them, by ``id``."""
    inside: list[Any] = []
    if type(thing).__module__.startswith("overspill") and id(thing) not in seen:
        seen[id(thing)] = thing
        inside += [getattr(thing, name, None) for name in dir(thing) if not name.startswith("_")]
    if isinstance(thing, Mapping | Sequence) and not isinstance(thing, str) and len(thing) < 100:
        inside += thing.values() if isinstance(thing, Mapping) else thing
    for one in inside:
        of_ours(one, seen)
    return seen


def test_repr_of_all_that_comes_of_it_is_one_short_line(values: dict[str, Any], states: dict[str, Any]) -> None:
    """Streams and models in every state too, and what is in the results."""
    seen: dict[int, Any] = {}
    of_ours([*values.values()], seen)
    of_ours([*states.values()], seen)
    assert {type(one).__name__ for one in seen.values()} > {*VALUES, *OPENED, "Samples", "MemoryForecast"}
    for one in seen.values():
        said = repr(one)
        assert len(said) <= 200, said
        assert said.isprintable(), said


def test_repr_is_short_whatever_names_there_are(values: dict[str, Any]) -> None:
    """Files and callers give them."""
    info, hardware = hostile(values["ModelInfo"]), values["Hardware"]
    comparison: Comparison = values["Comparison"]
    one = replace(comparison.models[0], label=HOSTILE, problem=HOSTILE)
    for value in (
        info,
        plan(info, hardware=hardware),
        Placement(info),
        replace(hardware.cpu, description=HOSTILE),
        Hardware((*(replace(hardware.gpus[0], name=f"GPU{i}") for i in range(16)), hardware.cpu), "given", 2),
        replace(values["Bench"], info=info),
        replace(comparison, models=[one] * 20),
        one,
        replace(one.answers[0], question=HOSTILE, text=HOSTILE, problem=HOSTILE),
        replace(values["Completion"], text=HOSTILE),
        replace(values["ExpertTrace"], model=HOSTILE),
        replace(values["Tuned"], settings={"n_threads": HOSTILE}),
        replace(values["LlamaPlacement"], overrides=[(HOSTILE, "CPU")] * 100, devices=[HOSTILE]),
        replace(values["CascadeStats"], reason=HOSTILE),
        replace(values["ChatReply"], text=HOSTILE),
        replace(values["ChatToken"], text=HOSTILE),
        replace(values["CascadeToken"], token=replace(values["ChatToken"], text=HOSTILE)),
        replace(values["Draft"], text=HOSTILE, logprobs=(-1.0,) * 1000),
        replace(values["SamplingOptions"], logit_bias=dict.fromkeys(range(1000), 1.0), dry_sequence_breakers=[HOSTILE]),
        overspill.Judgement(True, HOSTILE),
        overspill.ToolCall(HOSTILE, {HOSTILE: HOSTILE}, HOSTILE),
    ):
        said = repr(value)
        assert type(value).__name__ in said
        assert len(said) <= 200
        assert said.isprintable()


def test_repr_says_what_matters(values: dict[str, Any]) -> None:
    """The facts that one asks for first."""
    planned: Plan = values["Plan"]
    for device, n_bytes in planned.bytes_by_device().items():
        assert (f"{device} {format_bytes(n_bytes)}" in repr(planned)) == (n_bytes > 0)
    assert f"{planned.forecast().tokens_per_s:.1f} tokens/s" in repr(planned.forecast())
    info: ModelInfo = values["ModelInfo"]
    assert str(info) in repr(info)
    assert str(values["Stats"]) in repr(values["Stats"])
    assert f"{values['Bench'].decode.tokens_per_s:.2f} tok/s" in repr(values["Bench"])
    assert repr(SamplingOptions(seed=3, top_k=0)) == "<overspill.SamplingOptions top_k=0, seed=3>"
    assert repr(values["ToolCall"]) == "<overspill.ToolCall f(a=[1])>"
    assert repr(overspill.ChatToken(7, " sky", overspill.Channel.FINAL)) == "<overspill.ChatToken 7 ' sky' final>"
    assert repr(values["CascadeStats"]).startswith(
        "<overspill.CascadeStats the small model answered: it was sure; small:"
    )


# --- pickle


def content(value: Any) -> Any:
    """Return what a value is equal by."""
    if isinstance(value, Sampler):
        return value.options, value.state, value.sample(np.linspace(0, 1, 50, dtype=np.float32))
    if isinstance(value, ExpertTrace):
        return [one.tolist() for one in value.requests], value.n_prompt, value.n_experts, value.layers, value.model
    if isinstance(value, Plan):
        plans = (value.settings, value.pins, value.chosen, value.experts, value.whole_layers_tokens_per_s)
        return value.to_dict(), value.forecast(), value.hardware, value.info, plans
    return value.to_dict() if hasattr(value, "to_dict") else value


@pytest.mark.parametrize("name", VALUES)
def test_pickle_gives_an_equal_value(values: dict[str, Any], name: str) -> None:
    """For other processes, and for another day."""
    value = values[name]
    copy = pickle.loads(pickle.dumps(value))
    assert type(copy) is type(value)
    assert content(copy) == content(value)
    if name not in ("ExpertTrace", "ExpertStudy", "Sampler"):  # which are equal to themselves alone
        assert copy == value
    assert repr(copy) == repr(value)


def test_a_trace_from_a_pickle_is_read_only(values: dict[str, Any]) -> None:
    """As one that was recorded."""
    trace: ExpertTrace = pickle.loads(pickle.dumps(values["ExpertTrace"]))
    assert not any(request.flags.writeable for request in trace.requests)


# --- attributes


OPENED = ("AsyncChatStream", "AsyncStream", "Cascade", "CascadeStream", "Chat", "ChatStream", "ChatTemplate", "Model",
          "Sampler", "Stream", "Token")  # fmt: skip
"""Classes of what is open, has been, or runs."""


@pytest.fixture(scope="module")
def states(smollm2_path: Path, gemma_path: Path) -> Iterator[dict[str, Any]]:
    """Return what a model hands out, in every state that it can be in."""
    options: dict[str, Any] = {"n_ctx": 128, "n_threads": 1}
    given: dict[str, Any] = {"temperature": 0, "max_tokens": 3}
    with ExitStack() as stack:
        model, base, fresh, closed, vocabulary, closed_vocabulary = (
            stack.enter_context(one)
            for one in (
                *(Model(path, **options) for path in (smollm2_path, gemma_path, smollm2_path, smollm2_path)),
                *(Model(smollm2_path, vocab_only=True) for _ in range(2)),
            )
        )
        found: dict[str, Any] = {"model": model, "model without a template": base, "model as it is loaded": fresh}
        found |= {"vocabulary": vocabulary, "closed model": closed, "closed vocabulary": closed_vocabulary}
        model.eval([1, 2])
        openers: dict[str, Callable[[Model], Any]] = {
            "stream": lambda one: one.stream("x", **given),
            "stream with logits": lambda one: one.stream("x", logits=True, **given),
            "reply": lambda one: one.chat("x", **given),
            "async stream": lambda one: one.astream("x", **given),
            "async reply": lambda one: one.achat("x", **given),
        }
        for name, opened in openers.items():
            found |= {f"fresh {name}": opened(model), f"{name} of a closed model": opened(closed)}
            if "async" in name:
                continue
            running, left, finished = opened(model), opened(model), opened(model)
            found |= {f"running {name}": running, f"token of a {name}": next(running)}
            next(left)
            left.close()
            first, *_, last = finished
            found |= {f"left {name}": left, f"finished {name}": finished}
            found |= {f"first token of a {name}": first, f"last token of a {name}": last}
        cascade, closed_cascade = (overspill.Cascade(model, base, lambda draft: True) for _ in range(2))
        found |= {"cascade": cascade, "closed cascade": closed_cascade, "sampler": Sampler(seed=1)}
        found |= {"fresh cascade's stream": cascade.stream("x", **given)}
        found |= {"finished cascade's stream": (stream := cascade.stream("x", **given)), "its token": [*stream][-1]}
        closed_cascade.close()
        found |= {"chat": overspill.Chat(model), "chat of a closed model": overspill.Chat(closed)}
        found |= {"template": model.chat_template, "template of a closed model": closed.chat_template}
        del closed.__dict__["chat_template"]  # as if nobody had asked for it before
        closed.close()
        closed_vocabulary.close()
        yield found


def test_the_states_are_of_every_class(states: dict[str, Any]) -> None:
    """A new class is looked at here or among the values."""
    classes = {name for name in overspill.__all__ if isinstance(getattr(overspill, name), type)}
    others = {name for name in classes if issubclass(getattr(overspill, name), (BaseException, str, tuple))}
    protocols = {name for name in classes if getattr(getattr(overspill, name), "_is_protocol", False)}
    assert {*OPENED} == (classes - others - protocols - {*VALUES}) | {"Sampler", "Token"}
    assert {type(one).__name__ for one in states.values()} >= {*OPENED}


def test_asking_for_an_attribute_raises_in_no_state(states: dict[str, Any]) -> None:
    """``hasattr``, ``getattr`` with a default and ``inspect.getmembers``, as notebooks and debuggers use them."""
    absent = {}
    for state, one in states.items():
        names = {*dir(one), *dir(type(one))}
        absent[state] = {name for name in names if not hasattr(one, name) and getattr(one, name, None) is None}
        inspect.getmembers(one)
    assert absent["model"] == absent["running stream with logits"] == absent["running reply"] == set()
    assert absent["model as it is loaded"] == {"logits"}
    assert absent["model without a template"] == {"logits", "chat_template"}
    assert absent["closed model"] >= {"logits", "chat_template", "has_chat_template", "special_tokens"}
    assert absent["token of a stream"] == {"logits"}
    assert absent["template of a closed model"] == {"_model"}


def test_an_absent_attribute_says_why(states: dict[str, Any]) -> None:
    """It is the library's error still, by its class and its words, and as such goes to other processes."""
    for state, name, kind, words in (
        ("model as it is loaded", "logits", overspill.Error, r"no logits yet: model\.eval"),
        ("model without a template", "chat_template", overspill.Error, r"has no chat template: .*model\.stream"),
        ("closed model", "special_tokens", overspill.ClosedError, "is closed"),
        ("closed model", "chat_template", overspill.ClosedError, "is closed"),
        ("token of a stream", "logits", overspill.Error, r"stream\(\.\.\., logits=True\)"),
        ("first token of a stream with logits", "logits", overspill.Error, "overwritten"),
    ):
        with pytest.raises(kind, match=words) as raised:
            getattr(states[state], name)
        assert isinstance(raised.value, AttributeError)
        copy = pickle.loads(pickle.dumps(raised.value))
        assert (type(copy), str(copy)) == (kind, str(raised.value))


def test_asking_for_an_attribute_does_not_raise(values: dict[str, Any]) -> None:
    """Of values, and of headers of damaged files."""
    info: ModelInfo = values["ModelInfo"]
    wrong: list[Any] = ["x", 1.5, {"element": "u8", "length": 2}, {"element": "u8", "length": 1, "values": [1]}]
    keys = [key for key in info.metadata if key.startswith(("gpt-oss.", "general."))]
    damaged = [replace(info, metadata={**info.metadata, **dict.fromkeys(keys[1:], value)}) for value in wrong]
    empty = ModelInfo({}, [], ["x"], 0)
    odd = [ExpertReplay("lru", 1, 8, 0, (), (), ()), overspill.ExpertStats(0, 0, 0, 0, 0, 0, 0, 0, is_off=False)]
    token = values["Token"]
    for value in (*(one for one in values.values() if one is not token), *damaged, empty, *odd):
        for name in dir(type(value)):
            hasattr(value, name)
        assert hasattr(value, "__class__")
    assert damaged[0].n_layers == 0
    assert "unknown" in repr(empty)


def test_placements_are_looked_at_in_any_state(values: dict[str, Any]) -> None:
    """Edited plans too: the map follows."""
    planned: Plan = values["Plan"].copy()
    planned.expert_cache = {}
    planned.assign(part="experts", layers=range(2), device="gpu")
    (name, segments), *_ = bars(parsed(planned))
    moved = sum(planned.info.layers[layer]["experts"] for layer in range(2))
    sizes = sizes_in(segments)
    assert (name, sizes["experts"]) == ("GPU0", moved)
    assert "cache of experts" not in sizes
