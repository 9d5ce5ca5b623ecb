"""``overspill chat``, driven through a terminal of 80 columns as a person would, and in a pipe."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from commands import overspill
from overspill import Model
from sweeps import sweep
from terminal_screen import Terminal

STATS = r"(\d+\.\d\d|–) tok/s · \d+ tokens? · (\d+\.\d\d s to|no) first token"
Start: TypeAlias = Callable[..., Terminal]
# A person talks in the foreground; a prompt that is to be stopped takes long on a CPU, and not on a GPU.
pytestmark = pytest.mark.usefixtures("heeds_interrupts", "no_gpu")


@pytest.fixture
def start(smollm2_path: Path, tmp_path: Path) -> Iterator[Start]:
    """Return what starts a chat with SmolLM2, whose replies are the most likely ones: none is empty by chance."""
    terminals = []

    def begin(*options: str) -> Terminal:
        usual = ["--ctx", "1024", "--threads", "2", "--temperature", "0"]
        arguments = ["-m", "overspill", "chat", str(smollm2_path), *usual, *options]
        terminals.append(Terminal(arguments, tmp_path / "data"))
        terminals[-1].wait_for_prompt()
        return terminals[-1]

    yield begin
    for terminal in terminals:
        terminal.close()


def messages(file: Path) -> list[dict[str, Any]]:
    """Return the conversation in a file."""
    found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["messages"]
    return found


def saved(terminal: Terminal, file: Path) -> list[dict[str, Any]]:
    """Have a conversation written to a file, and return it."""
    terminal.ask(f"/save {file}")
    return messages(file)


def squeezed(text: str) -> str:
    """Leave out what a terminal and Markdown change: space, line ends, marks."""
    return re.sub(r"[\s*_`#>\-+•▌.\d]", "", text)


# --- talking


@pytest.mark.slow
def test_a_conversation_in_japanese(start: Start, tmp_path: Path) -> None:
    """What is typed shows and is what the model gets; all of its answer is on the screen."""
    terminal = start("-n", "40")
    assert re.search(r"1024 tokens of context · /help for help", " ".join(terminal.text.split()))
    first = "日本の首都はどこですか？長い質問なので、八十桁の画面では二行にわたって表示されるはずです。"
    answer = terminal.ask(first)
    second = terminal.ask("もう一度お願いします。")
    assert "日本の首都はどこですか？" in terminal.text
    assert all(len(line) <= 80 for line in terminal.lines)
    said = saved(terminal, tmp_path / "chat.json")
    assert [message["role"] for message in said] == ["user", "assistant", "user", "assistant"]
    assert [said[0]["content"], said[2]["content"]] == [first, "もう一度お願いします。"]
    for shown, message in ((answer, said[1]), (second, said[3])):
        assert squeezed(message["content"])
        assert squeezed(message["content"]) in squeezed(shown)
    assert terminal.end() == 0


@pytest.mark.slow
def test_messages_of_several_lines(start: Start, tmp_path: Path) -> None:
    """Alt+Enter and a backslash begin lines, a paste keeps its own; only Enter sends."""
    terminal = start("-n", "3")
    terminal.type("one\\")
    terminal.keys("\r")
    terminal.type("two")
    terminal.keys("\x1b\r")
    terminal.keys("\x1b[200~three\rfour\r\rfive\\\x1b[201~")
    terminal.wait_for(r"> one\n  two\n  three\n  four\n\s*\n  five")
    terminal.type("!six")
    terminal.enter()
    terminal.wait_for_prompt()
    said = saved(terminal, tmp_path / "chat.json")
    assert said[0]["content"] == "one\ntwo\nthree\nfour\n\nfive\\!six"
    terminal.ask(" /system is no command after a space")
    assert saved(terminal, tmp_path / "chat.json")[2]["content"] == "/system is no command after a space"


def test_ctrl_c_stops_the_answer_and_not_the_program(start: Start, tmp_path: Path) -> None:
    """What has come of it stays, also in the conversation; the next message is answered."""
    terminal = start("-n", "300")
    terminal.type("Write a very long story about a dragon and a princess.")
    terminal.enter()
    terminal.wait_for(r"princess\.\n(.+\n){2}")
    terminal.keys("\x03")
    terminal.wait_for(r"\nstopped\n")
    terminal.wait_for_prompt()
    said = saved(terminal, tmp_path / "chat.json")
    assert [message["role"] for message in said] == ["user", "assistant"]
    assert squeezed(said[1]["content"]) in squeezed(terminal.text)
    assert "stop: interrupted" in terminal.ask("/stats")
    assert terminal.ask("Say hi.")
    assert "stop: interrupted" not in terminal.ask("/stats")
    # At the prompt it clears what was typed, and says how to leave.
    terminal.type("never mind")
    terminal.keys("\x03")
    terminal.wait_for_prompt()
    terminal.keys("\x03")
    terminal.wait_for("Ctrl-D or /exit ends the chat")
    assert len(saved(terminal, tmp_path / "chat.json")) == 4
    assert terminal.end() == 0


# Presses Ctrl-C in the middle of the drawing that gives the answer so many further lines.
INTERRUPTED_DRAWING = """
import os, re, signal, sys

class Output:
    def __init__(self, file, n_left):
        self._file, self._n_left = file, n_left
    def write(self, text):
        self._file.write(text)
        drawing = re.match(r"\\x1b\\[\\?2026h\\x1b\\[\\?7l\\x1b\\[(\\d+)A", text)
        if drawing and text.count("\\n") > int(drawing[1]):
            self._n_left -= 1
            if self._n_left == 0:
                os.kill(os.getpid(), signal.SIGINT)
    def __getattr__(self, name):
        return getattr(self._file, name)

sys.stdout = Output(sys.stdout, int(sys.argv.pop(1)))
from overspill.cli.app import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("n_lines", sweep([1, 3], always=[0]))
def test_ctrl_c_while_it_draws_loses_nothing(smollm2_path: Path, tmp_path: Path, n_lines: int) -> None:
    """What is drawn is drawn to its end: no line is there twice, and none is missing."""
    usual = ["chat", str(smollm2_path), "--threads", "2", "--temperature", "0", "-n", "300"]
    terminal = Terminal(["-c", INTERRUPTED_DRAWING, str(n_lines), *usual], tmp_path / "data")
    try:
        shown = terminal.ask("Write a very long story about a dragon and a princess.")
        said = saved(terminal, tmp_path / "chat.json")
        assert squeezed(shown) == squeezed(said[1]["content"]) + "stopped"
        assert terminal.end() == 0
    finally:
        terminal.close()


def test_ctrl_c_before_the_answer_gives_the_message_back(start: Start, tmp_path: Path) -> None:
    """It is not part of the conversation, and there to be edited."""
    terminal = start("-n", "5", "--ctx", "8192", "--batch", "4096")
    terminal.ask("Say hi.")
    question = "word " * 3000 + "end"
    terminal.keys(f"\x1b[200~{question}\x1b[201~")
    terminal.wait_for("word end")
    terminal.enter()
    terminal.wait(lambda: terminal.lines[-1] == "…")
    terminal.keys("\x03")
    terminal.wait_for("stopped before the answer: the message is not part of the chat")
    terminal.wait(lambda: terminal.lines[-1].endswith("word end"))
    terminal.keys("\x03")
    terminal.wait_for_prompt()
    assert [message["role"] for message in saved(terminal, tmp_path / "chat.json")] == ["user", "assistant"]
    assert messages(tmp_path / "chat.json")[0]["content"] == "Say hi."


@pytest.mark.slow
def test_typing_ahead(start: Start, tmp_path: Path) -> None:
    """What is typed during an answer does not mix with it, and is the next input."""
    terminal = start("-n", "100")
    terminal.type("Write a long story about a dragon.")
    terminal.enter()
    terminal.wait_for(r"dragon\.\n.*\w+ \w+ \w+")
    terminal.keys("Say hi.\x1b\rTwice.\r")
    terminal.wait_for(r"> Say hi\.\n  Twice\.\n(.*\n)*>$")
    said = saved(terminal, tmp_path / "chat.json")
    assert said[2]["content"] == "Say hi.\nTwice."
    assert squeezed(said[1]["content"]) in squeezed(terminal.text)


# --- commands


@pytest.mark.slow
def test_save_and_load(start: Start, smollm2_path: Path, tiny_gpt_oss_path: Path, tmp_path: Path) -> None:
    """A conversation goes on in another process, with what was said; nothing is lost by a wrong name."""
    file = tmp_path / "a chat.json"
    terminal = start("-n", "30")
    terminal.ask("Answer with the word banana and nothing else.")
    assert terminal.ask(f"/save {file}").startswith("2 messages saved to ")
    first = messages(file)
    terminal.ask("Say hi.")
    assert terminal.ask("/save").startswith("4 messages saved to ")  # the same file
    assert len(messages(file)) == 4
    assert terminal.end("/exit\r") == 0

    other = tmp_path / "other.txt"
    other.write_text("dear to me")
    terminal = start("-n", "30")
    assert "error: /save needs the name of a file: /save FILE" in terminal.ask("/save")
    terminal.ask("Say hi.")
    assert "is there already, and not replaced" in " ".join(terminal.ask(f"/save {other}").split())
    assert other.read_text() == "dear to me"
    for wrong, complaint in (
        (tmp_path / "missing.json", "No such file"),
        (other, "is damaged, or not a chat"),
        (tmp_path, "is a folder"),
    ):
        answer = terminal.ask(f"/load {wrong}")
        assert answer.startswith("error: ")
        assert complaint in " ".join(answer.split())
    # Nothing was lost by all that.
    assert "2 messages ·" in terminal.ask("/stats")
    loaded = terminal.ask(f"/load {file}")
    assert "4 messages loaded from" in loaded
    assert "> Say hi." in loaded
    terminal.ask("Thank you.")
    terminal.ask("/save")
    said = messages(file)
    assert said[:2] == first
    assert len(said) == 6
    assert terminal.end() == 0

    terminal = start("--load", str(file), "--system", "Be brief.")
    assert "7 messages loaded from" in terminal.text
    assert "> Thank you." in terminal.text
    assert [message["role"] for message in saved(terminal, tmp_path / "again.json")][:2] == ["system", "user"]


@pytest.mark.slow
def test_retry(start: Start, tmp_path: Path) -> None:
    """The last message is answered anew, and the new answer takes the place of the old one."""
    terminal = start("--temperature", "1.5", "-n", "20")
    assert "error: there is no question yet" in terminal.ask("/retry")
    terminal.ask("Say hi.")
    terminal.ask("Tell me about the sea.")
    before = saved(terminal, tmp_path / "chat.json")
    answer = terminal.ask("/retry")
    after = saved(terminal, tmp_path / "chat.json")
    assert before[:3] == after[:3]
    assert len(before) == len(after) == 4
    assert before[3] != after[3]
    assert squeezed(after[3]["content"]) in squeezed(answer)


@pytest.mark.slow
def test_system_and_new(start: Start, tmp_path: Path) -> None:
    """A system prompt is set, shown, removed, and outlives a new conversation."""
    terminal = start("--system", "Be brief.", "-n", "3")
    assert terminal.ask("/system") == "Be brief."
    terminal.ask("Say hi.")
    terminal.ask("/system 短く答えて。")
    assert terminal.ask("/SYSTEM") == "短く答えて。"
    assert saved(terminal, tmp_path / "chat.json")[0] == {"role": "system", "content": "短く答えて。"}
    terminal.ask("/new")
    assert saved(terminal, tmp_path / "new.json") == [{"role": "system", "content": "短く答えて。"}]
    terminal.ask("/system -")
    assert terminal.ask("/system") == "there is no system prompt"


def test_other_commands(start: Start) -> None:
    """Help names them all, stats and placement are those of the model, and a wrong one gets a line."""
    terminal = start("-n", "3")
    assert terminal.ask("/stats") == "there is no reply yet"
    help_text = terminal.ask("/help")
    for command in ("system", "retry", "new", "save", "load", "reasoning", "stats", "placement", "exit"):
        assert f"/{command}" in help_text
    assert "Ctrl-C" in help_text
    terminal.ask("Say hi.")
    stats = terminal.ask("/stats")
    assert re.match(STATS, stats)
    assert re.search(r"2 messages · \d+ of 1024 tokens of context", stats)
    placement = terminal.ask("/placement")
    assert re.search(r"layers +attention +dense +kv", placement)
    assert re.search(r"all weights +CPU\s92\.1\sMiB", placement)
    assert terminal.ask("/bogus x") == (
        "error: there is no command /bogus: /help lists them; a space before it sends it"
    )
    assert "error: /reasoning must be dim or hide" in terminal.ask("/reasoning loud")
    assert terminal.end("/exit\r") == 0


@pytest.mark.slow
def test_a_message_that_does_not_fit(start: Start, tmp_path: Path) -> None:
    """One line says so, the conversation is as it was, and the message is there to be shortened."""
    terminal = start("-n", "3", "--ctx", "256")
    terminal.ask("Say hi.")
    terminal.keys(f"\x1b[200~{'word ' * 400}end\x1b[201~")
    terminal.wait_for("word end")
    terminal.enter()
    terminal.wait_for(r"error: the prompt has \d+ tokens")
    terminal.wait(lambda: terminal.lines[-1].endswith("word end"))
    terminal.keys("\x03")
    terminal.wait_for_prompt()
    assert len(saved(terminal, tmp_path / "chat.json")) == 2


@pytest.mark.slow
def test_the_history_is_kept(start: Start, tmp_path: Path) -> None:
    """The next chat has what was typed in this one, in several lines too; nobody else can read it."""
    terminal = start("-n", "3")
    terminal.ask("最初の質問")
    assert terminal.end() == 0
    terminal = start("-n", "3")
    terminal.keys("\x1b[A")
    terminal.wait(lambda: terminal.lines[-1] == "> 最初の質問")
    assert terminal.enter()
    terminal.wait_for_prompt()
    file = tmp_path / "data" / "overspill" / "chat_history"
    assert file.stat().st_mode & 0o077 == 0
    assert "最初の質問" in file.read_text(encoding="utf-8")


# --- replies of any kind: the real chat, whose model is made to say something

CHILD = """
import itertools, logging, sys
from pathlib import Path
from rich.console import Console
import overspill
from overspill.cli.terminal.chat import ChatTerminal

path, template, reply, reasoning, max_tokens = sys.argv[1:]
with overspill.Model(path, n_ctx=2048, n_threads=2) as model:
    model.chat_template = overspill.ChatTemplate(model, Path(template).read_text(encoding="utf-8"))
    text = Path(reply).read_text(encoding="utf-8")
    script = itertools.cycle([*model.tokenize(text, add_special=False), model.special_tokens["eos"]])

    def choose(logits, tokens):
        if text == "Something odd.":
            logging.getLogger("overspill").warning("this is odd")
        if text == "A bug.":
            raise TypeError("nobody saw it coming")
        return next(script)

    chat = overspill.Chat(model, sampler=choose, max_tokens=int(max_tokens))
    ChatTerminal(chat, Console(stderr=True, highlight=False), reasoning=reasoning).run()
"""


@pytest.fixture
def scripted(smollm2_path: Path, vocabularies: Path, tmp_path: Path) -> Iterator[Callable[[str, str], Terminal]]:
    """Return what starts a chat in which the model says what it is told, with Qwen 3's template."""
    terminals = []

    def begin(reply: str, reasoning: str = "dim", max_tokens: int = 2000) -> Terminal:
        (tmp_path / "reply.txt").write_text(reply, encoding="utf-8")
        template = vocabularies / "templates" / "Qwen-Qwen3-0.6B.jinja"
        arguments = ["-c", CHILD, str(smollm2_path), str(template), str(tmp_path / "reply.txt")]
        arguments += [reasoning, str(max_tokens)]
        terminals.append(Terminal(arguments, tmp_path / "data"))
        return terminals[-1]

    yield begin
    for terminal in terminals:
        terminal.close()


def styles(terminal: Terminal, text: str) -> set[tuple[bool, str]]:
    """Return how the characters of a line look that has a text in it."""
    rows = [*terminal.screen.history.top, *(terminal.screen.buffer[y] for y in range(terminal.screen.lines))]
    for row in rows:
        line = "".join(row[x].data for x in range(80))
        if text in line:
            begin = line.index(text)
            return {(row[x].bold, row[x].fg) for x in range(begin, begin + len(text))}
    raise AssertionError(f"{text!r} is not on the screen:\n{terminal.text}")


@pytest.mark.slow
def test_an_answer_taller_than_the_screen(scripted: Callable[..., Terminal]) -> None:
    """All of it can be scrolled to, once, as Markdown: code, a list, a table, Japanese."""
    code = "\n".join(f"value_{n} = {n}" for n in range(40))
    table = "\n".join(f"| 行{n} | {n * n} |" for n in range(30))
    items = "\n".join(f"{n}. 項目{n}" for n in range(1, 31))
    terminal = scripted(
        f"# 見出し\n\n```python\n{code}\n```\n\n{items}\n\n| a | b |\n|---|---|\n{table}\n\n**終わり**です。"
    )
    answer = terminal.ask("こんにちは").splitlines()
    assert answer[0] == "見出し"
    assert [line.strip() for line in answer if "value_" in line] == code.splitlines()
    assert [line.split() for line in answer if "項目" in line] == [[f"{n}", f"項目{n}"] for n in range(1, 31)]
    assert [line.split() for line in answer if "行" in line] == [[f"行{n}", f"{n * n}"] for n in range(30)]
    assert answer[-1] == "終わりです。"
    assert not any("```" in line or "|---" in line for line in answer)
    assert styles(terminal, "終わり") == {(True, "default")}
    assert terminal.end() == 0


@pytest.mark.slow
def test_reasoning_is_dimmed_or_hidden(scripted: Callable[..., Terminal]) -> None:
    """Dimmed it comes before the answer; hidden, nothing of it is left. The answer is the same."""
    reply = "<think>\nThe user greets. I greet back, 丁寧に。\n</think>\n\nこんにちは！"
    terminal = scripted(reply)
    assert terminal.ask("Hello") == "The user greets. I greet back, 丁寧に。\n\nこんにちは！"
    output = terminal.raw
    assert re.search(r"\x1b\[2m[^\x1b]*The", output), "it is not dimmed"
    assert terminal.ask("/reasoning hide") == "reasoning: hide"
    assert terminal.ask("Hello again") == "こんにちは！"
    assert "thinking, " in terminal.raw
    assert "greets" not in terminal.raw[len(output) :]
    terminal = scripted(reply, "hide")
    assert terminal.ask("Hello") == "こんにちは！"


def test_escape_sequences_of_a_reply_do_nothing(scripted: Callable[..., Terminal]) -> None:
    """Neither in the answer nor in reasoning: no title, no cleared screen."""
    evil = "\x1b]0;owned\x07\x1b[2J\x1b[1;1H\x1b[31mtext"
    terminal = scripted(f"<think>\n{evil}\n</think>\n\n{evil}")
    answer = terminal.ask("Hello")
    assert answer.count("]0;owned[2J[1;1H[31mtext") == 2
    assert "owned" not in terminal.screen.title
    assert terminal.lines[0].strip() != ""


def test_a_reply_of_nothing(scripted: Callable[..., Terminal]) -> None:
    """The message comes back."""
    terminal = scripted("")
    terminal.wait_for_prompt()
    terminal.type("Hello")
    terminal.enter()
    terminal.wait_for("the model said nothing: the message is not part of the chat\n> Hello")
    terminal.keys("\x03")
    assert terminal.ask("/stats").startswith("– tok/s · 1 token")


@pytest.mark.slow
def test_a_reply_that_is_cut_off(scripted: Callable[..., Terminal]) -> None:
    """A line says so, and after how many tokens; a reply that came to its end has none."""
    assert scripted("One two three four five.", max_tokens=3).ask("Hello") == "One two three\n\ncut off after 3 tokens"
    assert scripted("One two three.").ask("Hello") == "One two three."


def test_warnings_wait_for_the_end_of_the_reply(scripted: Callable[..., Terminal]) -> None:
    """In its middle they would be drawn among its lines."""
    answer = scripted("Something odd.").ask("Hello")
    assert re.fullmatch(r"Something odd\.\n\n(warning: this is odd\n?)+", answer)


def test_a_bug_does_not_end_the_chat(scripted: Callable[..., Terminal]) -> None:
    """One line tells of it, and the message is there to be sent again."""
    terminal = scripted("A bug.")
    terminal.wait_for_prompt()
    terminal.type("Hello")
    terminal.enter()
    terminal.wait(lambda: terminal.text.count("> Hello") == 2)
    said = "error: a bug in overspill; --verbose shows where: TypeError: nobody saw it coming"
    assert said in terminal.text.replace("\n", "")  # the screen breaks the line anywhere
    assert "Traceback" not in terminal.text
    terminal.keys("\x03")
    terminal.wait_for_prompt()
    assert terminal.end() == 0


# --- without a terminal


def test_in_a_pipe_standard_input_is_one_message(smollm2_path: Path) -> None:
    """All its lines together; the answer is plain text, and the stats go elsewhere."""
    question = "Which of these is a colour?\n/help\nred\n"
    options = [str(smollm2_path), "--temperature", "0", "--ctx", "1024", "-n", "30"]
    done = overspill("chat", *options, stdin=question)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(STATS + r".* · stop: \w+\n", done.stderr)
    assert "\x1b" not in done.stdout + done.stderr
    with Model(smollm2_path, n_ctx=1024) as model:
        assert done.stdout == "".join(map(str, model.chat(question, temperature=0, max_tokens=30))) + "\n"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["missing.gguf"], 2, "standard input is empty, and would be the message"),
        (["missing.gguf", "<", "Hello"], 1, "missing.gguf: no such file"),
        (["TINY", "<", "Hello"], 1, "has no chat template"),
        (["SMOL", "--reasoning", "loud"], 2, "--reasoning must be one of dim, hide, not 'loud'"),
        (["missing.gguf", "--temp", "-1"], 2, "--temp must be 0 or more"),
        (["SMOL", "--load", "missing.json", "<", "Hello"], 1, "missing.json: No such file"),
    ],
)
def test_mistakes_get_one_line_and_an_exit_code(
    tiny_gpt_oss_path: Path, smollm2_path: Path, arguments: Sequence[str], code: int, text: str
) -> None:
    """Before anything is asked."""
    names = {"TINY": str(tiny_gpt_oss_path), "SMOL": str(smollm2_path)}
    command, stdin = (arguments[:-2], arguments[-1]) if "<" in arguments else (arguments, "")
    done = overspill("chat", *(names.get(argument, argument) for argument in command), stdin=stdin)
    assert done.returncode == code
    assert text in done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 or "--help" in done.stderr


def test_a_history_that_cannot_be_kept(smollm2_path: Path, tmp_path: Path) -> None:
    """One line says so, and the chat goes on."""
    (tmp_path / "data").write_text("in the way")
    terminal = Terminal(["-m", "overspill", "chat", str(smollm2_path), "--ctx", "256", "-n", "3"], tmp_path / "data")
    try:
        terminal.wait_for("the history is not kept")
        assert terminal.ask("Say hi.")
        assert terminal.end() == 0
    finally:
        terminal.close()
    assert (tmp_path / "data").read_text() == "in the way"
