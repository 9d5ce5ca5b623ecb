"""A comparison while it grows: in columns on a terminal, in sections elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from overspill.base.text import printable, wrap
from overspill.base.units import format_bytes
from overspill.studies.compare.answers import NO_CHAT, Answer, ComparedModel
from overspill.studies.compare.comparison import Comparison

__all__ = ["Columns", "Sections"]

_NARROWEST_COLUMN = 24
_REFRESH_S = 0.1


def _facts(one: ComparedModel, answer: Answer) -> list[tuple[list[str], str]]:
    """Return lines with their styles; a line is a list of parts that are not broken."""
    facts: list[tuple[list[str], str]] = []
    for problem in dict.fromkeys((one.problem, answer.problem)):
        if problem:
            facts.append(([printable(problem)], "red"))
    if answer.stats is not None:
        facts.append((str(answer.stats).split(" · "), "green"))
    room = {device.name: device.memory_bytes for device in one.hardware.devices}
    uses = [
        f"{device} {format_bytes(use.total_bytes)}" + (f" of {format_bytes(room[device])}" if room.get(device) else "")
        for device, use in one.memory.items()
    ]
    facts.append((uses, "dim"))
    speeds = one.forecast.tokens_per_s, one.forecast.prompt_tokens_per_s
    expected = "about {:.1f} tok/s expected, {:.0f} in prompts".format(*speeds)
    facts.append(([one.forecast.verdict, *([expected] if one.hardware.source == "measured" else [])], "dim"))
    if one.chats is False:
        facts.append(([NO_CHAT], "yellow"))
    return facts


def _is_done(comparison: Comparison, one: ComparedModel, answer: Answer) -> bool:
    is_current = comparison.current is not None and comparison.current[1] is answer
    return bool(one.problem or answer.problem or answer.stats) and not is_current


class Columns:
    """Answers side by side: their ends while they come, as far as the terminal has room; then the whole."""

    def __init__(self, console: Console, n_models: int) -> None:
        """Show ``n_models`` models on a terminal."""
        self._console, self._n_models = console, n_models
        self._comparison: Comparison | None = None
        self._task: tuple[str, float] | None = None
        self._n_printed = 0
        self._refreshed = 0.0
        self._live = Live(console=console, get_renderable=self._render, auto_refresh=False, transient=True)

    @staticmethod
    def fit(console: Console, n_models: int) -> bool:
        """Return whether the console is a terminal with room for so many columns."""
        return console.is_terminal and (console.width - 3 * (n_models - 1)) // n_models >= _NARROWEST_COLUMN

    def __enter__(self) -> Columns:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._task = None
        self._live.stop()
        if self._comparison is not None:
            self._comparison.current = None
            self._print_answered(whole=False)

    def progress(self, what: str, share: float) -> None:
        """Show the current step and a bar."""
        self._task = (what, share)
        self._refresh()

    def report(self, comparison: Comparison) -> None:
        """Show the answers so far."""
        self._comparison, self._task = comparison, None
        self._print_answered(whole=True)
        self._refresh()

    def _refresh(self) -> None:
        # Drawing takes time from the cores that decode.
        if time.monotonic() - self._refreshed >= _REFRESH_S:
            self._live.refresh()
            self._refreshed = time.monotonic()

    def _print_answered(self, *, whole: bool) -> None:
        """Print the next questions that all models have answered; if not ``whole``, those with any answer."""
        comparison = self._comparison
        while comparison is not None and self._n_printed < len(comparison.questions):
            number = self._n_printed
            answers = [(one, one.answers[number]) for one in comparison.models]
            if whole and not all(_is_done(comparison, *pair) for pair in answers):
                return
            self._n_printed += 1
            if whole or any(answer.text or answer.reasoning or answer.problem for _, answer in answers):
                self._console.print(self._columns(comparison, number, height=None))

    def _render(self) -> Group:
        parts: list[Group | Table] = []
        comparison = self._comparison
        if comparison is not None and self._n_printed < len(comparison.questions):
            number = self._n_printed
            if comparison.current is not None:
                one, answer = comparison.current
                number = next(i for i, other in enumerate(one.answers) if other is answer)
            parts.append(self._columns(comparison, number, height=self._console.height - 2))
        if self._task is not None:
            what, share = self._task
            line = Table.grid(padding=(0, 2))
            line.add_row(Text(what), ProgressBar(total=1.0, completed=share, width=30), f"{share:.0%}")
            parts.append(line)
        return Group(*parts)

    def _columns(self, comparison: Comparison, number: int, height: int | None) -> Group:
        width = (self._console.width - 3 * (self._n_models - 1)) // self._n_models
        head = f"{number + 1}/{len(comparison.questions)}  " if len(comparison.questions) > 1 else ""
        question = wrap(head + printable(comparison.questions[number]), self._console.width)
        facts = [self._foot(one, one.answers[number], width) for one in comparison.models]
        n_lines = None
        if height is not None:
            # Of the question the beginning, of the answers the end.
            question = question[: max(1, height // 4)]
            n_lines = max(1, height - len(question) - 5 - max(len(foot.plain.splitlines()) for foot in facts))
        bodies = [self._body(comparison, one, one.answers[number], width, n_lines) for one in comparison.models]
        table = Table(box=box.MINIMAL, show_edge=False, pad_edge=False)
        for one in comparison.models:
            table.add_column(Text(one.label, "bold cyan", overflow="fold"), width=width, overflow="fold")
        table.add_row(*(Text("\n").join(body) for body in bodies))
        table.add_section()
        table.add_row(*facts)
        return Group("", Text("\n".join(question), "bold"), "", table)

    def _body(
        self, comparison: Comparison, one: ComparedModel, answer: Answer, width: int, n_lines: int | None
    ) -> list[Text]:
        """Return an answer's lines: the last ``n_lines``, or all."""
        if not _is_done(comparison, one, answer) and not answer.text and not answer.reasoning:
            is_current = comparison.current is not None and comparison.current[1] is answer
            return [Text("reading the question…" if is_current else "waiting", "dim italic")]
        lines: list[Text] = []
        for text, style in ((answer.reasoning, "dim italic"), (answer.text, "")):
            shown = printable(text).strip()
            if n_lines is not None:
                # It is drawn ten times a second: what has scrolled out is not wrapped again.
                shown = "\n".join(shown.rsplit("\n", n_lines)[-n_lines:])
            if shown:
                lines += [Text()] * bool(lines)
                lines += [Text(line, style) for line in wrap(shown, width)]
        return lines if n_lines is None else lines[-n_lines:]

    def _foot(self, one: ComparedModel, answer: Answer, width: int) -> Text:
        return Text("\n").join(
            Text("\n".join(wrap(parts[0], width) if style == "red" else _filled(parts, " · ", width)), style)
            for parts, style in _facts(one, answer)
            if parts
        )


def _filled(parts: Sequence[str], separator: str, width: int) -> list[str]:
    lines: list[str] = []
    for part in parts:
        if lines and Text(lines[-1] + separator + part).cell_len <= width:
            lines[-1] += separator + part
        else:
            lines.append(part)
    return lines


class Sections:
    """Answers one below the other, as they come."""

    def __init__(self, console: Console) -> None:
        """Print to a console, where all that is printed stays."""
        self._console = console
        self._answer: tuple[ComparedModel, Answer] | None = None
        self._question: str | None = None
        self._n_reasoning = self._n_text = 0
        self._failed: set[str] = set()

    def __enter__(self) -> Sections:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not BrokenPipeError:
            self._end()

    def report(self, comparison: Comparison) -> None:
        """Print what has been added."""
        for one in comparison.models:
            if one.problem and one.label not in self._failed:
                self._failed.add(one.label)
                self._print(f"{one.label}: {one.problem}\n", "red")
        if comparison.current is None:
            self._end()
            return
        one, answer = comparison.current
        if self._answer is None or self._answer[1] is not answer:
            self._end()
            if self._question is not None:
                self._print("\n")
            self._answer, self._n_reasoning, self._n_text = (one, answer), 0, 0
            if self._question != answer.question:
                self._question = answer.question
                self._print(f"# {answer.question}\n\n", "bold")
            self._print(f"## {one.label}\n\n", "bold")
        reasoning, text = answer.reasoning.lstrip("\n"), answer.text.lstrip("\n")
        self._reply(reasoning[self._n_reasoning :], "dim")
        if self._n_text == 0 and text and reasoning:
            self._print("\n\n")
        self._reply(text[self._n_text :])
        self._n_reasoning, self._n_text = len(reasoning), len(text)

    def _end(self) -> None:
        if self._answer is None:
            return
        lines = [" · ".join(parts) for parts, _ in _facts(*self._answer) if parts]
        self._print("\n\n")
        self._print("".join(f"{line}\n" for line in lines), "dim")
        self._answer = None

    def _reply(self, text: str, style: str = "") -> None:
        """Print a model's text, of which a pipe gets each character."""
        if self._console.is_terminal:
            self._print(text, style)
        else:
            self._console.file.write(text)
            self._console.file.flush()

    def _print(self, text: str, style: str = "") -> None:
        if text:
            self._console.print(Text(printable(text), style), end="", soft_wrap=True)
