"""Comparisons: the answers are each model's own, whatever happens to another, and the page is safe to open."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import pytest
from rich.console import Console

import overspill
from model_files import llama_cpp_folder
from overspill import Answer, ComparedModel, Comparison, Hardware, Model, ModelInfo, compare
from overspill.base.units import format_bytes
from overspill.engine.model import _open_models
from overspill.studies.compare.markdown import render_markdown
from overspill.studies.compare.plans import plan_together
from overspill.studies.compare.view import Columns, Sections, _wrapped
from plan_cases import GIB
from programs import python_environment

QUESTIONS = ["The capital of France is", "昔々、あるところに"]
OPTIONS: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "max_tokens": 8}


def saying(text: str) -> str:
    """Return a grammar that leaves a model nothing else to say."""
    return "root ::= " + json.dumps(text, ensure_ascii=False).replace("\\u001b", "\\x1B")


# --- answers


@pytest.mark.parametrize("room", ["", "430MiB"])
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


# --- what goes wrong


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
        ({"memory": {"CUDA7": "1GiB"}}, ValueError, "memory must be one of CPU"),
        ({"temperature": -1}, ValueError, "temperature must be 0 or more"),
        ({"warmth": 1}, TypeError, "warmth"),
    ],
    ids=str,
)
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


# --- the page


class Page(HTMLParser):
    """What a page consists of, as another parser than ours sees it."""

    def __init__(self, page: str) -> None:
        """Read it."""
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.maps: list[dict[str, Any]] = []
        """Devices by part and, in order, layer: from the titles in each picture."""
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take note of an element."""
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "svg" and dict(attrs).get("role") == "img":
            self.maps.append({})

    def handle_endtag(self, tag: str) -> None:
        """Go back to what it was in."""
        while self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        """Keep the text, and what the map says."""
        if self._open and self._open[-1] == "style":
            return
        self.text += data
        if self._open[-2:] == ["rect", "title"]:
            found = re.fullmatch(r"(layer (\d+), )?([\w, ]+): (\w+), .+", data)
            assert found, data
            _, layer, part, device = found.groups()
            if layer is None:
                self.maps[-1].update(dict.fromkeys(part.split(", "), device))
            else:
                devices = self.maps[-1].setdefault("kv" if part == "KV cache" else part, [])
                assert len(devices) == int(layer)
                devices.append(device)


class Canary:
    """A server that takes note of who comes."""

    def __init__(self) -> None:
        """Listen on loopback."""
        self.paths: list[str] = []
        canary = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                canary.paths.append(self.path)
                self.send_error(404)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def canary() -> Iterator[Canary]:
    """Start one for a test."""
    server = Canary()
    yield server
    server.close()


def hostile(address: str) -> str:
    """Return what a model must not get a reader's browser to do."""
    return (
        f'<script>document.title = "taken"</script><script src="{address}/a.js"></script>\n\n'
        f'<img src="{address}/b.png" onerror="document.title = 1"> <iframe src="{address}/c"></iframe>\n\n'
        f'<link rel="stylesheet" href="{address}/d.css"><style>@import url("{address}/e.css");</style>\n\n'
        f'<meta http-equiv="refresh" content="0; url={address}/f"> <svg onload="document.title = 2"></svg>\n\n'
        f"![a picture]({address}/g.png) [wrong](javascript:document.title=3) [mail](mailto:a@example.org)\n\n"
        f"<https://example.org/> [data](data:text/html,x) [file](file:///etc/passwd) </div></article></main>\n"
    )


@pytest.fixture
def hostile_page(tiny_gpt_oss_path: Path, tmp_path: Path, canary: Canary) -> str:
    """Return the page of a model whose output, question, system prompt and file name are all HTML."""
    path = tmp_path / f"<img src=x onerror=alert(1)>&\"'{'long' * 20}.gguf"
    path.symlink_to(tiny_gpt_oss_path)
    text = hostile(canary.address)
    found = compare(
        [path, tiny_gpt_oss_path],
        text,
        system=text,
        grammar=saying(text),
        **{**OPTIONS, "n_ctx": 4096, "max_tokens": 1000},
    )
    assert [one.answers[0].text for one in found.models] == [text, text]
    return found.to_html()


def test_output_with_html_is_text(hostile_page: str, canary: Canary) -> None:
    """No element, attribute or address of it is in the page, except links of the web and of mail."""
    page = Page(hostile_page)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "link", "object", "embed", "base", "form", "image", "use"}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert tag == "a" or not {"src", "href", "xlink:href", "srcset", "action"} & set(attributes)
    links = {attributes["href"] for tag, attributes in page.elements if tag == "a"}
    assert links == {f"{canary.address}/g.png", "mailto:a@example.org", "https://example.org/"}
    assert [a["http-equiv"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a] == [
        "Content-Security-Policy"
    ]
    assert page.text.count(f'<iframe src="{canary.address}/c">') == 2 + 2  # question and system prompt, and two answers
    assert hostile_page.count("</main>") == 1


def test_markdown() -> None:
    """What models write often: emphasis, lists, code, tables; headings below the page's; nothing else is HTML."""
    html = render_markdown("# *Title*\n\n- a\n- `b<c`\n\n```python\nx < 1\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n")
    for part in ("<h4><em>Title</em></h4>", "<li><code>b&lt;c</code></li>", "x &lt; 1", "<td>2</td>"):
        assert part in html
    assert render_markdown("a <b>b</b> &amp; &lt;i&gt;") == "<p>a &lt;b&gt;b&lt;/b&gt; &amp; &lt;i&gt;</p>\n"
    for url in (
        "javascript:x",
        "JAVASCRIPT:x",
        "java\tscript:x",
        "data:text/html,x",
        "//example.org",
        "file:///x",
        "x",
    ):
        assert "<a" not in render_markdown(f"[x](<{url}>) ![x](<{url}>)\n\n[x]\n\n[x]: <{url}>")


def test_the_page_says_what_was_so(gemma_path: Path, tiny_gpt_oss_path: Path) -> None:
    """Each answer with its stats, memory, verdict, settings, and the language of a text."""
    found = compare([gemma_path, tiny_gpt_oss_path], QUESTIONS, temperature=0.5, seed=7, **OPTIONS)
    page = Page(found.to_html())
    for one in found.models:
        assert one.forecast.reason in page.text
        assert format_bytes(one.memory["CPU"].total_bytes) in page.text
        for answer in one.answers:
            assert answer.stats is not None
            assert f"{answer.stats.tokens_per_second:.2f} tok/s" in page.text
            assert f"{answer.stats.time_to_first_token_s:.2f} s to first token" in page.text
    for text in (*found.summary(), *QUESTIONS, "CPU only", "cut off", "temperature 0.5", "seed"):
        assert text in page.text
    assert [a["lang"] for tag, a in page.elements if tag == "h2" and "lang" in a] == ["", "ja"]
    assert [len(one["attention"]) for one in page.maps] == [18, 4]
    assert len(json.loads(json.dumps(found.to_dict()))["models"]) == 2


CHROMIUM = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM_ELSEWHERE = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Return a browser; skip where there is none."""
    found = [path for name in CHROMIUM if (path := shutil.which(name))]
    found += [path for path in CHROMIUM_ELSEWHERE if Path(path).is_file()]
    if not found:
        message = "no Chromium to open the page in: apt install chromium"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found[0]


def opened(chromium: str, page: str, folder: Path) -> str:
    """Open a page in a browser, and return the HTML that it made of it."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    command = [chromium, "--headless", "--disable-gpu", "--no-first-run", f"--user-data-dir={folder / 'profile'}"]
    command += ["--window-size=1400,900", "--dump-dom", (folder / "page.html").as_uri()]
    if hasattr(os, "getuid") and os.getuid() == 0:
        command.insert(1, "--no-sandbox")  # which Chromium cannot set up as root
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    return done.stdout.decode()


def test_a_browser_loads_and_runs_nothing(chromium: str, hostile_page: str, canary: Canary, tmp_path: Path) -> None:
    """Nobody asks for what the model's output names, and none of its scripts runs."""
    dom = opened(chromium, hostile_page, tmp_path)
    assert canary.paths == []
    page = Page(dom)
    assert not {tag for tag, _ in page.elements} & {"script", "img", "iframe", "link"}
    assert "<title>&lt;script&gt;document.title" in dom
    assert page.text.count(f'<iframe src="{canary.address}/c">') >= 4
    # The policy holds as well if something of it should get in, and without it all this would be noticed.
    inside = hostile_page.replace("<main>", f"<main>{hostile(canary.address).split('<meta')[0]}")
    assert "<title>&lt;script&gt;document.title" in opened(chromium, inside, tmp_path)
    assert canary.paths == []
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", inside)
    assert re.search("<title>(taken|1)</title>", opened(chromium, bare, tmp_path))
    assert {"/a.js", "/b.png", "/c", "/d.css"} <= set(canary.paths)


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_fits_the_screen(chromium: str, hostile_page: str, tmp_path: Path, width: int) -> None:
    """Nothing sticks out of a telephone's width, however long its words; a wide one has the answers in columns."""
    # In a frame, since a window cannot be that narrow.
    frame = f"""<!doctype html><iframe style="border:0;width:{width}px;height:900px" srcdoc="{escape(hostile_page)}"
        onload="const page = this.contentDocument, root = document.documentElement;
        const boxes = [...page.querySelectorAll('.answer')].map(box => box.getBoundingClientRect());
        root.dataset.measured = JSON.stringify([page.documentElement.clientWidth, page.documentElement.scrollWidth,
            boxes.map(box => [box.left, box.right, box.top])])"></iframe>"""
    ((_, attributes),) = [found for found in Page(opened(chromium, frame, tmp_path)).elements if found[0] == "html"]
    inner, scrolled, boxes = json.loads(attributes["data-measured"] or "")
    assert scrolled <= inner
    assert width - 20 < inner <= width  # there may be a scroll bar
    (_, right, top), (other_left, _, other_top) = boxes
    assert (right < other_left and top == other_top) if width == 1280 else other_top > top


# --- in a terminal and in a pipe


COMMAND = [sys.executable, "-m", "overspill", "compare"]
SHORT = ["--threads", "1", "--ctx", "256", "-n", "8", "--seed", "3"]
STATS = r"(\d+\.\d\d|–) tok/s · \d+ tokens? · \d+\.\d\d s to first token · stop: \w+"


def overspill_compare(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run it with pipes."""
    return subprocess.run([*COMMAND, *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=120)


def test_a_pipe_gets_sections(gemma_path: Path, tiny_gpt_oss_path: Path, tmp_path: Path) -> None:
    """Question, model, answer, stats, memory and verdict, as text; and the page is written."""
    report = tmp_path / "report.html"
    asked = overspill_compare(gemma_path, tiny_gpt_oss_path, "昔々 [bold]あるところに", "--html", report, *SHORT)
    assert asked.returncode == 0, asked.stderr
    assert asked.stderr == f"written: {report}\n"
    assert "\x1b" not in asked.stdout
    found = compare([gemma_path, tiny_gpt_oss_path], "昔々 [bold]あるところに", seed=3, **OPTIONS)
    sections = asked.stdout.split("\n## ")
    assert sections[0] == "# 昔々 [bold]あるところに\n"
    for section, one in zip(sections[1:], found.models, strict=True):
        assert section.startswith(f"{one.label}\n\n")
        assert one.answers[0].text.strip("\n") in section
        assert re.search(f"^{STATS}$\n^CPU .*B of .*B$\n^CPU only", section, re.MULTILINE)
    assert "decode" in asked.stdout.splitlines()[-3]
    assert "昔々 [bold]あるところに" in Page(report.read_text(encoding="utf-8")).text


@pytest.mark.parametrize("form", ["lines", "json", "standard input"])
def test_several_questions(tiny_gpt_oss_path: Path, tmp_path: Path, form: str) -> None:
    """One on each line, or in a list; the question alone may come from standard input."""
    questions = ["What is 1+1?", "日本の首都は？"] if form != "standard input" else ["two\nlines"]
    arguments: list[object] = [tiny_gpt_oss_path, tiny_gpt_oss_path, *SHORT, "--json"]
    if form == "lines":
        (tmp_path / "q.txt").write_text("\n".join(["", *questions, "  "]), encoding="utf-8")
        arguments += ["--questions", tmp_path / "q.txt"]
    elif form == "json":
        (tmp_path / "q.json").write_text(json.dumps(questions))
        arguments += ["--questions", tmp_path / "q.json"]
    else:
        arguments.insert(2, "-")
    done = overspill_compare(*arguments, stdin="two\nlines")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["questions"] == questions
    for one in found["models"]:
        assert [answer["stats"]["tokens"] for answer in one["answers"]] == [8] * len(questions)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "Missing argument"),
        (["TINY", "x"], 2, "two or more models can be compared, and here is 1"),
        (["TINY", "TINY"], 2, "is a model: put the question, in quotes, after the models"),
        (["TINY", "TINY", "x", "--questions", "EMPTY"], 2, "holds no questions"),
        (["TINY", "TINY", "--questions", "missing.txt"], 1, "missing.txt"),
        (["TINY", "TINY", "--questions", "WRONG"], 2, "must hold a list of questions as strings"),
        (["TINY", "TINY", "x", "--html", "FOLDER"], 1, "is a folder; give a file in it"),
        (["TINY", "TINY", "x", "--html", "FOLDER/none/report.html"], 1, "its folder is missing"),
        (["TINY", "missing.gguf", "x"], 1, "missing.gguf: no such file"),
        (["TINY", "TINY", "x", "-t", "-1"], 2, "temperature must be 0 or more"),
        (["TINY", "TINY", "x", "--memory", "20GiB"], 2, "--memory must be DEVICE=SIZE"),
        (["TINY", "TINY", "x", *["--offload", "cpu"] * 3], 2, "one for each of the 2 models, not 3"),
    ],
    ids=str,
)
def test_mistakes_get_one_line_and_an_exit_code(
    tiny_gpt_oss_path: Path, tmp_path: Path, arguments: list[str], code: int, text: str
) -> None:
    """The line says what is wrong; nothing comes out on standard output."""
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "wrong.json").write_text("{}")
    names = {"TINY": tiny_gpt_oss_path, "EMPTY": tmp_path / "empty.txt", "WRONG": tmp_path / "wrong.json"}
    given = [str(names.get(argument, argument)).replace("FOLDER", str(tmp_path)) for argument in arguments]
    done = overspill_compare(*given)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 or "--help" in done.stderr


def test_a_model_that_fails_makes_the_command_fail(tiny_gpt_oss_path: Path, tmp_path: Path) -> None:
    """The other's answer is there, the page is written, and the error is the last line."""
    damaged, report = tmp_path / "damaged.gguf", tmp_path / "report.html"
    damaged.write_bytes(tiny_gpt_oss_path.read_bytes()[:-1000])
    done = overspill_compare(tiny_gpt_oss_path, damaged, "x", "--html", report, *SHORT)
    assert done.returncode == 1
    assert re.search(STATS, done.stdout)
    assert done.stderr.splitlines()[-1].startswith("error: damaged: ")
    assert "damaged.gguf" in report.read_text(encoding="utf-8")


def shown(
    path: Path,
    text: str,
    view: Callable[[Console], Columns | Sections],
    width: int,
    color_system: Literal["standard"] | None = None,
) -> str:
    """Return what a view prints of a model that says something, beside itself."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=color_system, height=20)
    with view(console) as shown_in:
        options = {**OPTIONS, "n_ctx": 1024, "max_tokens": 200}
        compare([path] * 2, "x", grammar=saying(text), report=shown_in.report, **options)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("view", [lambda console: Columns(console, 2), Sections], ids=["columns", "sections"])
def test_output_does_not_control_the_terminal(
    tiny_gpt_oss_path: Path, view: Callable[[Console], Columns | Sections]
) -> None:
    """Escape sequences, a cursor that goes back, and text that turns around come out as replacement characters."""
    out = shown(tiny_gpt_oss_path, "a\x1b[2Jb\x07c\rd\u202ee [red]f[/red]\n", view, 100)
    assert "a�[2Jb�c�d�e [red]f[/red]" in out
    # What is left of the sequences is the view's own: they move the cursor up, erase lines, and hide it.
    assert {sequence[-1] for sequence in re.findall(r"\x1b\[[\d;?]*.", out)} <= {"A", "K", "l", "h"}
    assert "\x07" not in out
    assert "\u202e" not in out


def terminal(*arguments: object, columns: int = 90, interrupt_at: str = "") -> tuple[list[list[str]], object]:
    """Run it in a terminal of 24 lines, with Ctrl-C when a text is there; return the screens, and the exit code.

    The last of the screens has what scrolled out above it.
    """
    pexpect: Any = pytest.importorskip("pexpect", reason="a terminal is played by pexpect, which needs a POSIX system")
    pyte: Any = pytest.importorskip("pyte")
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    child = pexpect.spawn(
        COMMAND[0],
        [*COMMAND[1:], *map(str, arguments)],
        env=environment,
        encoding="utf-8",
        dimensions=(24, columns),
        timeout=120,
    )
    screen = pyte.HistoryScreen(columns, 24, history=1000)
    stream = pyte.Stream(screen)
    screens: list[list[str]] = []
    interrupted = False
    while True:
        try:
            stream.feed(child.read_nonblocking(65536, timeout=120))
        except pexpect.EOF:
            break
        screens.append(list(screen.display))
        if interrupt_at and not interrupted and re.search(interrupt_at, "\n".join(screen.display)):
            interrupted = True
            child.sendintr()
    child.close()
    above = ["".join(line[column].data for column in range(columns)) for line in screen.history.top]
    screens.append([*above, *screen.display])
    return screens, child.exitstatus


def cells(screen: Sequence[str]) -> list[list[str]]:
    """Return the lines of the table on a screen in their columns, and check that these are in line."""
    (top,) = [number for number, line in enumerate(screen) if re.fullmatch(r"[─┼]+ *", line)][:1]
    rows = [line for line in screen[top - 1 :] if "│" in line]
    # A wide character takes up two places of the screen: the second is empty.
    assert {line.index("│") for line in rows} == {screen[top].index("┼")}
    return [[cell.strip() for cell in line.split("│")] for line in rows]


def places(screen: Sequence[str]) -> list[str]:
    """Return lines in which every character takes up as many places as on the screen."""
    import unicodedata

    return ["".join(c + " " * (unicodedata.east_asian_width(c) in "WF") for c in line.rstrip()) for line in screen]


def test_a_terminal_shows_columns_that_grow(gemma_path: Path, tiny_gpt_oss_path: Path) -> None:
    """First one answer grows and the other waits; at the end both are whole, in line, whatever the language."""
    prompt = "昔々、あるところに"
    screens, code = terminal(
        gemma_path, tiny_gpt_oss_path, prompt, "--threads", 1, "-n", 120, "--seed", 3, "--ctx", 512
    )
    assert code == 0
    growing = {
        len("".join(left for left, *_ in cells(places(screen))))
        for screen in screens[:-1]
        if any("waiting" in line for line in screen) and any("┼" in line for line in screen)
    }
    assert len(growing) > 2
    last = places(screens[-1])
    rows = cells(last)
    answers = ["".join(row[column] for row in rows).replace(" ", "") for column in (0, 1)]
    found = compare([gemma_path, tiny_gpt_oss_path], prompt, seed=3, **{**OPTIONS, "n_ctx": 512, "max_tokens": 120})
    for one, shown in zip(found.models, answers, strict=True):
        assert re.sub(r"\s", "", one.answers[0].text) in shown
        assert re.search(r"120tokens.*stop:max_tokens.*CPU.*CPUonly", shown)
    assert re.search(r"[\u3040-\u9fff]{10}", answers[0])
    assert any("times as fast as" in line for line in last)


@pytest.mark.parametrize("width", [1, 10, 24, 41])
@pytest.mark.parametrize(
    "text",
    [
        "1. 太陽光は、赤から紫までのさまざまな色の光が混ざったものです。（「レイリー」散乱）",
        "one two  three\n\n    def f(x):\n\treturn x  # 返す\n" + "x" * 50,
        "日本語とEnglishのmixed、テキスト。" * 5,
        "",
    ],
)
def test_lines_are_broken_where_a_reader_expects_it(text: str, width: int) -> None:
    """Nothing is lost or too wide; Japanese fills lines, and none begins with a mark that ends something."""
    lines = _wrapped(text, width)
    assert re.sub(r"\s", "", "".join(lines)) == re.sub(r"\s", "", text)
    assert all(len(place.rstrip()) <= width for place in places(lines)) or width == 1
    assert len(lines) > text.count("\n")
    if width >= 10:
        assert not [line for line in lines if re.match("[、。）」ーョ]", line)]
    if text.startswith("1.") and width >= 24:
        assert lines[0].startswith("1. 太陽光は、赤")
        assert all(len(places([line])[0]) >= width - 6 for line in lines[:-1])


def test_a_narrow_terminal_gets_sections(tiny_gpt_oss_path: Path) -> None:
    """Where columns would hold a few words."""
    screens, code = terminal(tiny_gpt_oss_path, tiny_gpt_oss_path, "Hello", *SHORT, columns=40)
    assert code == 0
    assert not any("│" in line for line in screens[-1])
    assert sum(line.startswith("## tiny-gpt-oss") for line in screens[-1]) == 2


def test_ctrl_c_in_a_terminal(gemma_path: Path, smollm2_path: Path) -> None:
    """What there is stays on the screen, with its stats, and the exit code says that it was interrupted."""
    screens, code = terminal(
        gemma_path, smollm2_path, "Once upon a time", "--threads", 1, "-n", 0, "--seed", 3, interrupt_at="2. tokens"
    )
    assert code == 130
    shown = "\n".join(screens[-1])
    assert re.search(r"stop: interrupted +│", shown)
    assert "It was interrupted: not every answer is there, or whole." in " ".join(shown.split())


def test_ctrl_c_in_a_pipe(gemma_path: Path, smollm2_path: Path, tmp_path: Path) -> None:
    """The same, and the page is written with what there is."""
    report = tmp_path / "report.html"
    command = [*COMMAND, str(gemma_path), str(smollm2_path), "Once upon a time", "--html", str(report)]
    process = subprocess.Popen(
        [*command, "--threads", "1", "-n", "0", "--seed", "3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    text = b""
    while len(text.partition(b"## gemma-3-270m-q4_k_m\n\n")[2]) < 20:
        text += process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors
    assert "stop: interrupted" in (text + rest).decode()
    assert "interrupted" in Page(report.read_text(encoding="utf-8")).text


def test_a_closed_pipe_ends_quietly(gemma_path: Path, smollm2_path: Path) -> None:
    """When the reader goes away there is nothing to complain about."""
    process = subprocess.Popen(
        [*COMMAND, str(gemma_path), str(smollm2_path), "Once upon a time", "--threads", "1", "-n", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert errors == ""
