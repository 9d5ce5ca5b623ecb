"""The page of a comparison says what was so, and is safe to open."""

from __future__ import annotations

import json
import os
import re
import subprocess
from html import escape
from pathlib import Path

import pytest

from browsers import Canary, hostile
from comparisons import OPTIONS, QUESTIONS, Page, saying
from overspill import compare
from overspill.base.units import format_bytes
from overspill.studies.compare.markdown import render_markdown
from sweeps import sweep


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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("width", sweep([400, 1280], always=[0]))
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
