"""The page in a real browser: it asks real servers, and models that say what a test wants."""

from __future__ import annotations

import html
import json
import re
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

from browsers import Canary, hostile
from chats import template
from overspill import Plan, plan
from overspill.machine.hardware import Hardware
from overspill.studies.compare.markdown import render_markdown
from servers import Server, serving
from speaking_models import write_speaking_model

LINE = "All work and *no play* makes 太郎 a dull boy.\n\n"
THOUGHT = "The user asks, so <b>I</b> think of 日本."
ANSWER = "**Hello**, 世界! 🙂\n\n| a | b |\n|:--|--:|\n| 1 | 2 |\n"
SECONDS = 30_000  # of a browser's patience, in milliseconds

expect.set_options(timeout=SECONDS)


@pytest.fixture(scope="module")
def canary() -> Iterator[Canary]:
    """Start one for all tests: nobody may come."""
    started = Canary()
    yield started
    started.close()


@pytest.fixture(scope="module")
def speakers(tmp_path_factory: pytest.TempPathFactory, canary: Canary) -> dict[str, Path]:
    """Return models by what they say."""
    folder, qwen = tmp_path_factory.mktemp("speakers"), template("Qwen-Qwen3-0.6B")
    written = partial(write_speaking_model, template=qwen)
    return {
        "thinker": written(folder / "thinker.gguf", f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"),
        "endless": written(folder / "endless.gguf", LINE, is_endless=True),
        "muser": written(folder / "muser.gguf", f"<think>\n{LINE * 400}</think>\n\n{LINE * 400}", is_endless=True),
        "hostile": written(folder / "hostile.gguf", hostile(canary.address)),
    }


@pytest.fixture(scope="module")
def server(speakers: dict[str, Path]) -> Iterator[Server]:
    """Serve them."""
    with serving(*speakers.values(), "--ctx", 100_000, "--parallel", 4, "--offload", "cpu") as started:
        yield started


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    """Start one, in which a name of another site is this machine's."""
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--host-resolver-rules=MAP elsewhere.example 127.0.0.1"]
        started = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield started
        started.close()


class Window:
    """A page, and what must not happen in it."""

    def __init__(self, browser: Browser, **options: Any) -> None:
        """Open an empty one."""
        self._context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.page = self._context.new_page()
        self.problems: list[str] = []
        self.requests: list[Request] = []
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request))

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(message.text)

    def open(self, server: Server, *models: str) -> Page:
        """Open a server's page, and choose models."""
        self.page.goto(server.url)
        if len(models) > 1:
            self.page.get_by_label("Side by side").check()
        for label, model in zip(("Model", "Second model"), models, strict=False):
            self.page.get_by_label(label, exact=True).select_option(model)
        return self.page

    def asked(self) -> list[dict[str, Any]]:
        """Return the requests for answers."""
        return [json.loads(one.post_data or "") for one in self.requests if one.url.endswith("/chat/completions")]

    def expect_problem(self, part: str) -> None:
        """Require that the console has told of something, and forget it."""
        assert [problem for problem in self.problems if part in problem], self.problems
        self.problems = [problem for problem in self.problems if part not in problem]

    def close(self) -> None:
        """Close it."""
        self._context.close()

    def close_in_order(self, server: Server) -> None:
        """Close it; nothing may have failed, and nobody else been asked."""
        self.close()
        assert self.problems == []
        assert all(one.url.startswith((server.url, "data:")) for one in self.requests)


@pytest.fixture
def window(browser: Browser, server: Server) -> Iterator[Window]:
    """Open a window for a test."""
    opened = Window(browser)
    yield opened
    opened.close_in_order(server)


def ask(page: Page, question: str, **settings: object) -> None:
    """Ask, with settings by their labels' first words."""
    if settings:
        page.get_by_text("Settings").click()
        for label, value in settings.items():
            page.get_by_label(label).fill(str(value))
    page.get_by_label("Question").fill(question)
    page.get_by_label("Question").press("Enter")


def wait_for_end(page: Page, n_answers: int = 1) -> None:
    """Wait until the last answers can be retried."""
    buttons = page.locator(".turn:last-child").get_by_role("button", name="Retry")
    expect(buttons).to_have_count(n_answers)


def text_of(markup: str) -> str:
    """Return the text of HTML."""
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


def test_a_conversation(browser: Browser, smollm2_path: Path, speakers: dict[str, Path]) -> None:
    """Answers are those of the API, of a cascade as well; follow-up questions have the answers before them."""
    cascade = f"cascade:{smollm2_path},{speakers['thinker']}"
    options = ("--ctx", 1024, "--parallel", 4, "--offload", "cpu")
    with serving(smollm2_path, speakers["thinker"], cascade, *options) as server:
        window = Window(browser)
        page = window.open(server, smollm2_path.stem)
        expect(page.locator(".verdict").first).to_have_text("Not loaded yet: CPU only")
        expect(page.locator(".card").first).to_contain_text("to the first token of a prompt of 1,024 tokens")
        ask(page, "Why is the sky blue?", Temperature=0, Most=24, System="Be brief.")
        wait_for_end(page)
        expect(page.locator(".verdict").first).to_have_text("Loaded")
        expect(page.locator(".card").first).to_contain_text("30 layers, all in RAM")
        facts = page.locator(".facts").inner_text()
        assert re.search(r"tok/s\n24 tokens\n[\d.]+ m?s to first token\ncut off at the most tokens$", facts), facts
        ask(page, "And at night?")
        wait_for_end(page)
        for request, shown in zip(window.asked(), page.locator(".answer > .text").all(), strict=True):
            reply = server.client().chat.completions.create(**request | {"stream": False, "stream_options": None})
            assert shown.text_content() == text_of(render_markdown(reply.choices[0].message.content or ""))
        first, second = (request["messages"] for request in window.asked())
        assert [message["role"] for message in second] == ["system", "user", "assistant", "user"]
        assert (
            second[:2]
            == first
            == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sky blue?"}]
        )
        page.get_by_role("button", name="New chat").click()
        page.get_by_label("Model", exact=True).select_option(f"cascade:{smollm2_path.stem},thinker")
        ask(page, "Hello")
        wait_for_end(page)
        request = window.asked()[-1]
        assert [message["content"] for message in request["messages"]] == ["Be brief.", "Hello"]
        reply = server.client().chat.completions.create(**request | {"stream": False, "stream_options": None})
        told = reply.choices[0].model_dump()["overspill"]
        expect(page.locator(".answer .reason")).to_have_text(f"Answered by {told['answered_by']}: {told['reason']}")
        window.close_in_order(server)


def test_two_side_by_side(window: Window, server: Server) -> None:
    """Each has its own answer and conversation, and a question its answers beside each other."""
    page = window.open(server, "thinker", "hostile")
    ask(page, "One")
    wait_for_end(page, 2)
    answers = page.locator(".answer")
    expect(answers.nth(0)).to_contain_text("Hello, 世界! 🙂")
    expect(answers.nth(1)).to_contain_text("a picture")
    assert page.locator(".answer h3").all_inner_texts() == ["thinker", "hostile"]
    left, right = (answers.nth(i).bounding_box() for i in (0, 1))
    assert left is not None
    assert right is not None
    assert left["x"] + left["width"] < right["x"]
    assert left["y"] == right["y"]
    ask(page, "Two")
    wait_for_end(page, 2)
    for request in window.asked()[2:]:
        before = {"thinker": ANSWER, "hostile": hostile("")}[request["model"]]
        assert request["messages"][1]["content"][:8] == before[:8]
    assert page.locator("th[align=right]").count() == 2


def test_reasoning_is_folded(window: Window, server: Server) -> None:
    """It is text, and stays open when the reader opens it, also when it is asked for again."""
    page = window.open(server, "thinker")
    ask(page, "Hello")
    wait_for_end(page)
    reasoning = page.locator(".reasoning")
    assert reasoning.locator("summary").inner_text() == "Reasoning"
    assert reasoning.get_attribute("open") is None
    reasoning.locator("summary").click()
    expect(reasoning.locator(".text")).to_have_text(THOUGHT)
    assert reasoning.locator("b").count() == 0
    page.get_by_role("button", name="Retry").click()
    wait_for_end(page)
    assert reasoning.get_attribute("open") is not None
    expect(reasoning.locator(".text")).to_be_visible()


def test_a_long_thought(window: Window, server: Server) -> None:
    """It can be read while it goes on."""
    page = window.open(server, "muser")
    ask(page, "Hello")
    page.get_by_text("Thinking…").click()
    expect(page.locator(".reasoning p").first).to_have_text("All work and no play makes 太郎 a dull boy.")
    page.keyboard.press("Escape")
    wait_for_end(page)
    assert page.locator(".reasoning").get_attribute("open") is not None
    server.wait_until_free()


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stop_and_retry(window: Window, server: Server, way: str) -> None:
    """The server stops as well, the text so far is shown, and the question can be asked again."""
    page = window.open(server, "endless")
    for attempt in range(2):
        if attempt:
            page.get_by_role("button", name="Retry").click()
        else:
            ask(page, "Hello")
        expect(page.locator(".answer > .text p").nth(3)).to_be_visible()
        assert server.n_active() == 1
        if way == "button":
            page.get_by_role("button", name="Stop").click()
        else:
            page.keyboard.press("Escape")
        wait_for_end(page)
        server.wait_until_free()
        expect(page.locator(".facts")).to_contain_text("stopped")
        shown = page.locator(".answer > .text").inner_html()
        assert shown.startswith(str(render_markdown(LINE)))
        expect(page.get_by_role("status")).to_contain_text("endless was stopped")
    assert window.asked()[0] == window.asked()[1]


def test_rendering_while_text_comes(window: Window, server: Server) -> None:
    """One piece of an answer is rendered at a time, and what is the same stays: a selection in it, too.

    The page follows the text, but no more when its reader goes back.
    """
    page = window.open(server, "endless")
    n_open, most = 0, 0

    def count(change: int, request: Request) -> None:
        nonlocal n_open, most
        n_open += change * request.url.endswith("/overspill/markdown")
        most = max(most, n_open)

    page.on("request", partial(count, 1))
    page.on("requestfinished", partial(count, -1))
    ask(page, "Hello")
    expect(page.locator(".answer > .text p").nth(1)).to_be_attached()  # the first is whole
    first = page.locator(".answer > .text p").first.element_handle(timeout=SECONDS)
    expect(page.locator(".answer > .text p").nth(100)).to_be_attached()
    assert first.evaluate("node => node.isConnected")
    expect(page.locator(".facts")).to_be_in_viewport()
    page.mouse.wheel(0, -1500)
    expect(page.locator(".facts")).not_to_be_in_viewport()
    page.wait_for_timeout(200)  # the wheel turns on for a while
    place = page.evaluate("scrollY")
    n_shown = page.locator(".answer > .text p").count()
    expect(page.locator(".answer > .text p").nth(n_shown + 50)).to_be_attached()
    assert page.evaluate("scrollY") == place
    page.keyboard.press("Escape")
    wait_for_end(page)
    assert most == 1


def test_html_in_an_answer_is_text(window: Window, server: Server, canary: Canary) -> None:
    """No element of it is on the page, and nobody is asked for what it names."""
    page = window.open(server, "hostile")
    ask(page, hostile(canary.address))
    wait_for_end(page)
    assert page.title() == "Overspill"
    turn = page.locator(".turn")
    assert turn.locator("script, img, iframe, link, style, meta, svg, object, form, [style], [onload]").count() == 0
    for text in (turn.locator(".question"), turn.locator(".answer > .text")):
        expect(text).to_contain_text('<script>document.title = "taken"</script>')
    links = turn.locator(".answer a")
    expect(links).to_have_count(3)
    assert {link.get_attribute("target") for link in links.all()} == {"_blank"}
    assert canary.paths == []


def test_the_policy_holds_if_html_gets_in(browser: Browser, server: Server) -> None:
    """Without it, the same would be noticed."""
    noticed = Canary()
    try:
        for is_off in (False, True):
            window = Window(browser, bypass_csp=is_off)
            page = window.open(server, "hostile")
            inside = hostile(noticed.address).split("<meta")[0]  # no policy forbids to go elsewhere
            page.evaluate("html => { document.querySelector('main').innerHTML = html; }", inside)
            if is_off:
                page.wait_for_function("document.title !== 'Overspill'")
                assert "/b.png" in noticed.paths
            else:
                page.wait_for_timeout(300)
                assert page.title() == "Overspill"
                assert noticed.paths == []
                window.expect_problem("Content Security Policy")
            window.close()
    finally:
        noticed.close()


def test_an_error_is_shown(window: Window, server: Server) -> None:
    """In one line, and the question can be asked again."""
    page = window.open(server, "thinker")
    ask(page, "Hello", Temperature=3)
    problem = page.locator(".answer .problem")
    expect(problem).to_have_text("temperature: Input should be less than or equal to 2")
    window.expect_problem("400 (Bad Request)")
    page.get_by_label("Temperature").fill("1")
    page.get_by_role("button", name="Retry").click()
    wait_for_end(page)
    expect(page.locator(".answer > .text")).to_contain_text("Hello")
    expect(problem).to_be_hidden()


def test_a_server_that_ends(browser: Browser, speakers: dict[str, Path]) -> None:
    """The page says why the answer ended, and then that nobody is there; when somebody is, it goes on."""
    options = ("--ctx", 100_000, "--offload", "cpu")
    window = Window(browser)
    with serving(speakers["endless"], *options) as server:
        page = window.open(server, "endless")
        ask(page, "Hello")
        expect(page.locator(".answer > .text p").nth(3)).to_be_visible()
        server.process.send_signal(signal.SIGTERM)
        expect(page.locator(".answer .problem")).to_have_text("the server is shutting down")
        expect(page.locator(".answer > .text")).to_contain_text("All work and")
        server.process.wait(20)
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".answer .problem")).to_have_text("The connection to the server was lost.")
    window.close()
    window.expect_problem("ERR_CONNECTION_REFUSED")
    window.close_in_order(server)


def test_input_methods(window: Window, server: Server) -> None:
    """Enter that chooses characters sends nothing."""
    page = window.open(server, "thinker")
    question = page.get_by_label("Question")
    question.focus()
    devtools = page.context.new_cdp_session(page)
    devtools.send("Input.imeSetComposition", {"text": "にほんご", "selectionStart": 4, "selectionEnd": 4})
    page.keyboard.press("Enter")
    devtools.send("Input.insertText", {"text": "日本語"})
    # Safari's, after the composition.
    event = "{ key: 'Enter', keyCode: 229, bubbles: true, cancelable: true }"
    question.evaluate(f"node => node.dispatchEvent(new KeyboardEvent('keydown', {event}))")
    page.keyboard.insert_text("と🙂 für ")
    devtools.send("Input.imeSetComposition", {"text": "´", "selectionStart": 1, "selectionEnd": 1})
    page.keyboard.press("Escape")
    devtools.send("Input.insertText", {"text": "é"})
    page.wait_for_timeout(100)
    assert page.locator(".turn").count() == 0
    page.keyboard.press("Enter")
    expect(page.locator(".question")).to_have_text("日本語と🙂 für é")
    wait_for_end(page)
    assert question.input_value() == ""


FOCUSED = """() => {
    const one = document.activeElement;
    if (one === document.body) return ['', ''];  // between the page's end and its beginning
    const style = getComputedStyle(one);
    return [one.ariaLabel || one.labels?.[0]?.textContent || one.textContent.trim(), style.outlineStyle];
}"""


def test_keyboard_alone(window: Window, server: Server) -> None:
    """Everything can be reached, and seen to be."""
    page = window.open(server, "thinker")
    expect(page.locator(".verdict").first).not_to_be_empty()
    page.reload()
    expect(page.get_by_label("Question")).to_be_focused()
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(page.locator(".question")).to_have_text("One\ntwo", use_inner_text=True)
    wait_for_end(page)
    seen = []
    for _ in range(12):
        page.keyboard.press("Tab")
        label, outline = page.evaluate(FOCUSED)
        seen.append(label)
        assert outline != "none", label
        if label == "Retry":
            break
    expected = {"Send", "Settings", "Side by side", "New chat", "Model", "Memory", "Retry"}
    assert {label.strip() for label in seen} >= expected
    page.keyboard.press("Enter")
    wait_for_end(page)
    assert len(window.asked()) == 2
    expect(page.get_by_role("status")).to_have_attribute("aria-live", "polite")
    assert page.locator("[aria-live]").count() == 1


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours as WCAG has it, 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [float(part) / 255 for part in re.findall(r"[\d.]+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_screens(browser: Browser, server: Server, width: int, scheme: str) -> None:
    """Nothing sticks out, however long its words; texts can be read on light grounds and dark ones."""
    window = Window(browser, viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = window.open(server, "thinker", "hostile")
    ask(page, "x" * 400, Temperature=1)
    wait_for_end(page, 2)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    style = "node => { const style = getComputedStyle(node); return [style.color, style.backgroundColor]; }"
    text, ground = page.locator("body").evaluate(style)
    assert contrast(ground, "rgb(255, 255, 255)" if scheme == "light" else "rgb(0, 0, 0)") < 1.5
    assert contrast(text, ground) > 7
    _, panel = page.locator(".card").first.evaluate(style)
    for selector in (".verdict", ".quiet", ".facts", "summary", ".answer a"):
        colour, _ = page.locator(selector).first.evaluate(style)
        assert contrast(colour, panel) > 4.5, selector
    colour, ground = page.get_by_role("button", name="Send").evaluate(style)
    assert contrast(colour, ground) > 4.5
    window.close_in_order(server)


def given_plan(header_path: Callable[[str], Path]) -> tuple[Plan, dict[str, Any]]:
    """Return a plan for a machine with a small GPU, and what the server would tell of it."""
    hardware = Hardware.given(ram="64GiB", vram=["12GiB"])
    made = plan(header_path("gpt-oss-120b"), hardware=hardware, n_ctx=8192, experts="static")
    told = {"model": "thinker", "loaded": False, "placement": made.to_dict(), "forecast": made.forecast().to_dict()}
    return made, told


def test_the_map_of_a_model_on_two_devices(window: Window, server: Server, header_path: Callable[[str], Path]) -> None:
    """Bars are as long as memory is used, and a row of layers shows the device of each."""
    made, told = given_plan(header_path)
    window.page.route("**/overspill/plan*", lambda route: route.fulfill(json=told))
    page = window.open(server, "thinker")
    outlook = made.forecast()
    expect(page.locator(".verdict").first).to_have_text(f"Not loaded yet: {outlook.verdict}")
    expect(page.locator(".memory").first).to_contain_text(outlook.reason)
    for bar, use in zip(page.locator(".card:first-child .bar").all(), outlook.memory.values(), strict=True):
        share = bar.evaluate(
            "bar => [...bar.children].reduce((sum, part) => sum + part.getBoundingClientRect().width, 0)"
            " / bar.getBoundingClientRect().width"
        )
        assert share == pytest.approx(use.total_bytes / use.free_bytes, abs=0.02)
    rows = page.locator(".card:first-child .layers")
    experts = rows.get_by_text("experts").locator("xpath=following-sibling::*[1]")
    in_ram = experts.locator("rect.cpu").evaluate_all("all => all.map(one => Number(one.getAttribute('width')))")
    assert sum(in_ram) == sum(layer.experts == "CPU" for layer in made.layers)


def test_a_key_is_asked_for(browser: Browser, speakers: dict[str, Path]) -> None:
    """Once for a tab; the page itself has no secret, and all else needs the key."""
    with serving(speakers["thinker"], "--ctx", 1024, "--offload", "cpu", "--api-key", "secret", key="secret") as server:
        assert httpx.get(f"{server.url}/").status_code == 200
        assert httpx.get(f"{server.url}/overspill/devices").status_code == 401
        assert httpx.post(f"{server.url}/overspill/markdown", json={"text": "x"}).status_code == 401
        window = Window(browser)
        page = window.page
        page.goto(server.url)
        dialog, field = page.get_by_role("dialog"), page.get_by_label("API key")
        expect(field).to_be_focused()
        assert field.get_attribute("type") == "password"
        field.fill("wrong")
        field.press("Enter")
        expect(dialog).to_contain_text("That key is wrong.")
        field.fill("secret")
        field.press("Enter")
        expect(dialog).to_be_hidden()
        ask(page, "Hello")
        wait_for_end(page)
        window.expect_problem("401 (Unauthorized)")
        page.reload()
        expect(page.locator(".verdict").first).to_have_text("Loaded")
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        window.close_in_order(server)


def test_other_sites_reach_nothing(browser: Browser, server: Server) -> None:
    """Neither under a name that leads to this machine, nor with a request that browsers send without asking."""
    window = Window(browser)
    port = server.url.rpartition(":")[2]
    response = window.page.goto(f"http://elsewhere.example:{port}/")
    assert response is not None
    assert response.status == 403
    elsewhere = Canary()
    try:
        window.page.goto(elsewhere.address)
        send = """url => fetch(url, { method: 'POST', mode: 'no-cors',
            body: new Blob(['{"model": "thinker", "messages": [{"role": "user", "content": "x"}]}']) })"""
        with window.page.expect_response("**/v1/chat/completions") as answered:
            window.page.evaluate(send, f"{server.url}/v1/chat/completions")
        assert answered.value.status == 403
    finally:
        elsewhere.close()
    window.close()


def test_headers(server: Server) -> None:
    """The policy allows the page's own script and style, by their hashes."""
    response = httpx.get(f"{server.url}/")
    policy = dict(part.strip().split(" ", 1) for part in response.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert all(re.fullmatch(r"'sha256-[\w+/]{43}='", policy[name]) for name in ("script-src", "style-src"))
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Referrer-Policy"] == "no-referrer"
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"


def test_markdown_over_http(server: Server) -> None:
    """Malformed and large texts are refused in the form of all errors."""
    assert server.post("/overspill/markdown", {"text": "*a* <b>"}).json() == {"html": "<p><em>a</em> &lt;b&gt;</p>\n"}
    for wrong in ({}, {"text": None}, {"text": "x" * 1_000_001}, b'{"text": "\\ud800"}', b"text"):
        response = server.post("/overspill/markdown", wrong)
        assert response.status_code == 400, wrong
        assert response.json()["error"]["message"]
