"""Comparisons: the answers are each model's own, whatever happens to another."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import overspill
from comparisons import OPTIONS, QUESTIONS, Page, saying, shown
from model_files import llama_cpp_folder
from overspill import Answer, ComparedModel, Comparison, Hardware, Model, ModelInfo, compare
from overspill.engine.model import _open_models
from overspill.studies.compare.plans import plan_together
from overspill.studies.compare.view import Columns, Sections
from plan_cases import GIB
from programs import python_environment
from sweeps import sweep


@pytest.mark.slow
@pytest.mark.parametrize("room", sweep(["", "430MiB"], always=[0]))
def test_answers_are_those_of_each_model_alone(gemma_path: Path, smollm2_path: Path, room: str) -> None:
    """With memory for both question by question, otherwise model by model, and never with more of them open."""
    open_before = sum(not model.closed for model in _open_models)
    order: list[tuple[str, str]] = []
    n_open: set[int] = set()

    def report(comparison: Comparison) -> None:
        if comparison.current is not None:
            one, answer = comparison.current
            n_open.add(sum(not model.closed for model in _open_models) - open_before)
            if (one.label, answer.question) not in order:
                order.append((one.label, answer.question))

    memory = {"cpu": room} if room else None
    paths = [gemma_path, smollm2_path]
    found = compare(paths, QUESTIONS, memory=memory, seed=3, temperature=0.9, report=report, **OPTIONS)
    a, b = (path.stem for path in paths)
    if room:
        assert order == [(a, QUESTIONS[0]), (a, QUESTIONS[1]), (b, QUESTIONS[0]), (b, QUESTIONS[1])]
    else:
        assert order == [(a, QUESTIONS[0]), (b, QUESTIONS[0]), (a, QUESTIONS[1]), (b, QUESTIONS[1])]
    assert n_open == {1 if room else 2}
    assert found.together == (not room)
    assert sum(not model.closed for model in _open_models) == open_before
    assert (found.problems, found.stopped, found.settings["seed"]) == ([], "", 3)
    for path, one in zip(paths, found.models, strict=True):
        with Model(path, n_ctx=256, n_threads=1) as model:
            assert one.memory == model.memory
            assert one.placement == model.placement
            for question, answer in zip(QUESTIONS, one.answers, strict=True):
                options: dict[str, Any] = {"seed": 3, "temperature": 0.9, "max_tokens": 8}
                chats = model.has_chat_template
                with model.chat(question, **options) if chats else model.stream(question, **options) as alone:
                    text = "".join(token.text for token in alone)
                assert (answer.question, answer.text, answer.reasoning) == (question, text, "")
                assert answer.stats is not None
                assert answer.stats.stop_reason == alone.stats.stop_reason
                assert answer.stats.tokens == alone.stats.tokens


def test_the_same_seed_for_all(tiny_gpt_oss_path: Path) -> None:
    """Also where none is given: a model beside itself says the same, and says it again with the seed that was drawn."""
    found = compare([tiny_gpt_oss_path] * 2, "x", temperature=1.0, **OPTIONS)
    again = compare([tiny_gpt_oss_path] * 2, "x", temperature=1.0, seed=found.settings["seed"], **OPTIONS)
    other = compare([tiny_gpt_oss_path] * 2, "x", temperature=1.0, seed=found.settings["seed"] ^ 1, **OPTIONS)
    texts = [one.answers[0].text for comparison in (found, again) for one in comparison.models]
    assert len(set(texts)) == 1
    assert other.models[0].answers[0].text != texts[0]
    assert [one.label for one in found.models] == [f"{tiny_gpt_oss_path.stem}, number {i}" for i in (1, 2)]


HARMONY = (
    "<|channel|>analysis<|message|>They ask. **Think**.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>It is *blue*."
)


@pytest.fixture(scope="module")
def harmony_path(tiny_gpt_oss_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny gpt-oss with the chat template of the real one."""
    path = tmp_path_factory.mktemp("harmony") / "harmony.gguf"
    template = llama_cpp_folder() / "models/templates/openai-gpt-oss-120b.jinja"
    command = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--chat-template-file", str(template)]
    subprocess.run([*command, str(tiny_gpt_oss_path), str(path)], check=True, capture_output=True, timeout=120)
    return path


def test_a_chat_model_is_asked_in_its_own_format(harmony_path: Path, tiny_gpt_oss_path: Path) -> None:
    """With the system prompt; what it says to itself is kept apart. A base model continues the question itself."""
    found = compare(
        [harmony_path, tiny_gpt_oss_path],
        "Why?",
        system="Be brief.",
        reasoning_effort="high",
        grammar=saying(HARMONY),
        **{**OPTIONS, "n_ctx": 1024, "max_tokens": 300},
    )
    (chat,), (base,) = (one.answers for one in found.models)
    assert (chat.reasoning, chat.text) == ("They ask. **Think**.", "It is *blue*.")
    assert (base.reasoning, base.text) == ("", HARMONY)
    assert chat.stats is not None
    assert base.stats is not None
    assert [one.chats for one in found.models] == [True, False]
    assert Page(found.to_html()).text.count("no chat template") == 1
    with Model(harmony_path, n_ctx=64, n_threads=1) as model:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
        prompt = model.chat_template.render(messages, reasoning_effort="high")
        assert "Be brief." in prompt
        assert chat.stats.prompt_tokens == len(model.tokenize(prompt))
        assert base.stats.prompt_tokens == len(model.tokenize("Why?"))
    html = found.to_html()
    assert "<details><summary>Reasoning</summary>" in html
    assert "<strong>Think</strong>" in html.partition("<details>")[2].partition("</details>")[0]
    assert "<em>blue</em>" in html.partition("</details>")[2]
    views: list[Callable[[Console], Columns | Sections]] = [lambda console: Columns(console, 2), Sections]
    for view in views:
        out = shown(harmony_path, HARMONY, view, 100, color_system="standard")
        assert re.search(r"\x1b\[2(;3)?mThey ask", out.replace("\x1b[0m\x1b[2m", ""))
        assert re.search(r"(?<!m)It is \*blue\*\.", out)


def test_labels_tell_files_apart(tiny_gpt_oss_path: Path, tmp_path: Path) -> None:
    """By the folder, or else by the offload; of a split model it is the name of the whole."""
    for name in ("new/model.gguf", "old/model.gguf", "big-00001-of-00002.gguf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tiny_gpt_oss_path)
    names = ["new/model.gguf", "old/model.gguf", "old/model.gguf", "big-00001-of-00002.gguf"]
    offload: list[Any] = ["auto", "auto", "cpu", "auto"]
    found = compare([tmp_path / name for name in names], "x", offload=offload, **OPTIONS)
    labels = [one.label for one in found.models]
    assert labels == ["model, in new", "model, in old, offload auto", "model, in old, offload cpu", "big"]


def planned(path: Path, hardware: Hardware) -> ComparedModel:
    """Return a model as planned for, alone on some hardware."""
    info = ModelInfo.from_file(path)
    placement = overspill.plan(info, hardware=hardware, n_ctx=8192)
    return ComparedModel(path.stem, path, info, "auto", hardware, placement, placement.forecast(), [])


@pytest.mark.parametrize(
    ("names", "vram", "ram", "together"),
    [
        (["gpt-oss-20b", "gpt-oss-20b"], 24, 128, True),  # 11 GiB each
        (["gpt-oss-20b", "gpt-oss-20b"], 18, 128, False),  # the second would be slower than alone
        (["gpt-oss-20b", "gpt-oss-120b"], 24, 128, False),  # which has a use for every byte of the GPU
        (["gpt-oss-120b", "gpt-oss-20b"], 96, 128, True),
        (["gpt-oss-20b", "gpt-oss-20b"], 0, 32, True),
        (["gpt-oss-20b", "gpt-oss-20b"], 0, 24, False),  # 23.1 GiB, and not 1 more for everything else
        (["gpt-oss-20b", "gpt-oss-20b", "gpt-oss-20b"], 24, 128, False),
    ],
    ids=str,
)
def test_memory_is_shared_only_where_none_is_slower_for_it(
    header_path: Callable[[str], Path], names: list[str], vram: int, ram: int, together: bool
) -> None:
    """Each is planned with what those before it leave, and then everything is within what there is."""
    hardware = Hardware.given(ram=ram * GIB, vram=vram * GIB)
    models = [planned(header_path(name), hardware) for name in names]
    settings = {"n_ctx": 8192, "n_ubatch": 512, "load_mode": "mmap"}
    placements = plan_together(models, settings)
    assert (placements is not None) == together
    for device in hardware.devices if placements is not None else ():
        needs = [
            overspill.forecast(one.info, placement, hardware, n_ctx=8192).memory[device.name].total_bytes
            for one, placement in zip(models, placements or (), strict=True)
        ]
        assert sum(needs) <= device.memory_bytes - GIB


ON_A_GPU = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
import overspill
from upstream_tools import stand_in_gpu

path, tools = sys.argv[1], Path(sys.argv[2])
options = {"n_ctx": 256, "n_threads": 1, "max_tokens": 8, "temperature": 0}
info = overspill.ModelInfo.from_file(path)
stand_in_gpu(tools, "GPU0", 8 << 30)
hardware = overspill.Hardware.here(measure=False)
placement = overspill.Placement.gpu(info, hardware.gpus)
needed = overspill.forecast(info, placement, hardware, n_ctx=256).memory["GPU0"].total_bytes
results = []
# What the GPU says that it has beyond what is to be left free on it, and what it gives; 0: what it says.
for claimed, real, offload in [(2.5, 0, "gpu"), (1.5, 0, "gpu"), (2.5, 1.5, "gpu"), (2.5, 0, 3)]:
    stand_in_gpu(tools, "GPU0", (1 << 30) + int(claimed * needed), refuse_bytes=int(real * needed))
    order = []
    def report(comparison):
        if comparison.current is not None:
            step = comparison.models.index(comparison.current[0]), comparison.current[1].question
            if step not in order:
                order.append(step)
    found = overspill.compare([path, path], ["a", "b"], offload=offload, report=report, **options)
    placements = [one.placement for one in found.models]
    results.append({
        "together": found.together,
        "problems": found.problems,
        "order": order,
        "texts": [[answer.text for answer in one.answers] for one in found.models],
        "gpu_bytes": [one.memory["GPU0"].total_bytes for one in found.models],
        "html": found.to_html(),
        "layers": [
            {part: [getattr(layer, part) for layer in one.layers] for part in ("attention", "dense", "experts", "kv")}
            | {"embedding": one.embedding, "output": one.output}
            for one in placements
        ],
    })
print(json.dumps(results), flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_on_a_gpu(tiny_gpt_oss_path: Path, upstream_tools: Path) -> None:
    """Both on it at once, one after the other, or so after it refused the second; and the maps show what is so."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-c", ON_A_GPU, str(tiny_gpt_oss_path), str(upstream_tools)],
            capture_output=True,
            text=True,
            timeout=600,
            env=python_environment(XDG_CACHE_HOME=cache),
        )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout)
    assert [result["together"] for result in results] == [True, False, False, True]
    by_question = [[0, "a"], [1, "a"], [0, "b"], [1, "b"]]
    assert results[0]["order"] == results[3]["order"] == by_question
    assert results[1]["order"] == results[2]["order"] == sorted(by_question)
    for result in results:
        assert result["problems"] == []
        assert result["texts"] == results[0]["texts"]
        assert all(result["gpu_bytes"])
        maps = Page(result["html"]).maps
        assert maps == result["layers"]
    assert {*results[3]["layers"][0]["experts"]} == {"CPU", "GPU0"}


def test_a_model_that_cannot_be_loaded(tiny_gpt_oss_path: Path, tmp_path: Path) -> None:
    """The other one answers, and the page says why, without the folder; if none can be loaded it is an error."""
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(tiny_gpt_oss_path.read_bytes()[:-1000])
    found = compare([damaged, tiny_gpt_oss_path], "x", **OPTIONS)
    assert found.models[0].problem
    assert [problem.partition(":")[0] for problem in found.problems] == ["damaged"]
    assert found.models[1].answers[0].text
    page = Page(found.to_html())
    assert "damaged.gguf" in page.text
    assert str(tmp_path) not in page.text
    with pytest.raises(overspill.Error, match=re.escape(str(damaged))):
        compare([damaged, damaged], "x", **OPTIONS)


def test_a_question_that_is_too_long(tiny_gpt_oss_path: Path) -> None:
    """It is its answer's problem, and the next one is asked."""
    long = "word " * 500
    found = compare([tiny_gpt_oss_path] * 2, [long, "x"], **OPTIONS)
    for one in found.models:
        assert "the context holds 256" in one.answers[0].problem
        assert (one.answers[0].text, one.answers[0].stats) == ("", None)
        assert one.answers[1].text
        assert not one.answers[1].problem
    assert "the context holds 256" in Page(found.to_html()).text
    with pytest.raises(overspill.ContextFullError):
        compare([tiny_gpt_oss_path] * 2, long, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"models": ["TINY"]}, ValueError, "models must be two or more, not 1"),
        ({"models": "TINY"}, TypeError, "models must be a sequence"),
        ({"models": ["TINY", "missing.gguf"]}, overspill.ModelLoadError, r"missing\.gguf: no such file"),
        ({"questions": []}, ValueError, "questions: there are none"),
        ({"questions": ["x", " "]}, ValueError, "questions: number 2 is empty"),
        ({"questions": [1]}, TypeError, "questions must be strings"),
        ({"offload": ["cpu"]}, ValueError, "offload must be one for all or one for each of the 2 models, not 1"),
        ({"offload": "some"}, ValueError, "offload must be"),
        ({"offload": "gpu"}, overspill.Error, "there is no GPU here"),
        ({"n_ctx": 0}, ValueError, "n_ctx must be at least 1"),
        ({"memory": {"CUDA7": "1GiB"}}, ValueError, "memory: there is no device 'CUDA7' here, only CPU"),
        ({"temperature": -1}, ValueError, "temperature must be 0 or more"),
        ({"warmth": 1}, TypeError, "warmth"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_gpu")
def test_bad_arguments(tiny_gpt_oss_path: Path, options: dict[str, Any], error: type[Exception], text: str) -> None:
    """Each is refused, and what the arguments are called is in it."""
    arguments: dict[str, Any] = {"models": ["TINY", "TINY"], "questions": "x", **OPTIONS, **options}
    models, questions = arguments.pop("models"), arguments.pop("questions")
    names = models if isinstance(models, str) else [str(tiny_gpt_oss_path) if m == "TINY" else m for m in models]
    with pytest.raises(error, match=text):
        compare(names, questions, **arguments)


def test_what_one_model_does_not_take_does_not_lose_the_others_answer(
    tiny_gpt_oss_path: Path, gemma_path: Path
) -> None:
    """A bias for a token that only the larger vocabulary has."""
    with pytest.raises(ValueError, match="logit_bias"):
        compare([tiny_gpt_oss_path, gemma_path], "x", logit_bias={200_000: -1.0}, **OPTIONS)
    found = compare([gemma_path, tiny_gpt_oss_path], "x", logit_bias={200_000: -1.0}, **OPTIONS)
    assert found.models[0].answers[0].text
    assert "logit_bias" in found.models[1].answers[0].problem


def test_errors_of_the_caller_reach_the_caller(tiny_gpt_oss_path: Path) -> None:
    """From each of the two functions that are called, and whatever their kind."""

    def fail(*_: object) -> None:
        raise ValueError("of the caller")

    with pytest.raises(ValueError, match="of the caller"):
        compare([tiny_gpt_oss_path] * 2, "x", report=fail, **OPTIONS)
    with pytest.raises(ValueError, match="of the caller"):
        compare([tiny_gpt_oss_path] * 2, "x", progress=fail, **OPTIONS)


@pytest.mark.usefixtures("heeds_interrupts")
def test_ctrl_c_keeps_what_there_is(tiny_gpt_oss_path: Path) -> None:
    """The first model's answer is whole, the second's as far as it came; before any of them it is an exception."""

    def interrupt(comparison: Comparison) -> None:
        answer = comparison.models[1].answers[0]
        if answer.stats is not None and answer.stats.tokens == 3 and comparison.current is not None:
            signal.raise_signal(signal.SIGINT)

    found = compare([tiny_gpt_oss_path] * 2, ["x", "y"], report=interrupt, temperature=0, seed=1, **OPTIONS)
    assert found.stopped == "interrupted"
    (whole, _), (part, _) = ([answer.stats for answer in one.answers] for one in found.models)
    assert whole is not None
    assert part is not None
    assert (whole.tokens, whole.stop_reason) == (8, "max_tokens")
    assert part.stop_reason == "interrupted"
    assert found.models[0].answers[0].text.startswith(found.models[1].answers[0].text)
    assert [one.answers[1] for one in found.models] == [Answer("y"), Answer("y")]
    assert any("interrupted" in sentence for sentence in found.summary())
    with pytest.raises(KeyboardInterrupt):
        compare([tiny_gpt_oss_path] * 2, "x", report=lambda comparison: signal.raise_signal(signal.SIGINT), **OPTIONS)


def test_speeds_are_over_all_answers(tiny_gpt_oss_path: Path) -> None:
    """Tokens after the first over the seconds for them; the summary names the faster one first."""
    found = compare([tiny_gpt_oss_path] * 2, QUESTIONS, **OPTIONS)
    stats = [answer.stats for answer in found.models[0].answers]
    assert found.models[0].tokens_per_second == pytest.approx(
        sum(one.tokens - 1 for one in stats if one) / sum(one.decode_s for one in stats if one)
    )
    first_s = [one.time_to_first_token_s or 0 for one in stats if one]
    assert found.models[0].time_to_first_token_s == pytest.approx(sum(first_s) / 2)
    slow, fast = found.models
    slow.answers = [replace(a, stats=replace(s, tokens=11, decode_s=10.0)) for a in slow.answers if (s := a.stats)]
    fast.answers = [replace(a, stats=replace(s, tokens=11, decode_s=0.5)) for a in fast.answers if (s := a.stats)]
    assert found.summary()[0] == f"{fast.label} decodes 20 times as fast as {slow.label}: 20.00 and 1.00 tok/s."
