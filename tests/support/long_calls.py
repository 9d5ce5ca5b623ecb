"""Calls that take long, or are made again and again, to be interrupted by Ctrl-C.

``python -m long_calls NAME MODEL.gguf VOCABULARIES FOLDER`` interrupts one, and prints how many seconds it took to end.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

import overspill
from header_files import write_header
from overspill import Chat, ChatTemplate, Error, Hardware, Model, ModelInfo, Sampler

__all__ = ["CALLS"]

HANG_S = 60
Call = Callable[[], object]


class Bench:
    """The files to work with, and the calls, each made ready by a method."""

    def __init__(self, path: Path, vocabularies: Path, folder: Path) -> None:
        """Take a model, the folder of vocabularies, and one to write to."""
        self.path, self.vocabularies, self.folder = path, vocabularies, folder

    def load(self, **options: Any) -> Model:
        """Load the model."""
        settings: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "offload": "cpu", **options}
        return Model(self.path, **settings)

    def tokenize(self, vocabulary: str, text: str) -> Call:
        """Tokenize a long text."""
        model = Model(self.vocabularies / f"ggml-vocab-{vocabulary}.gguf", vocab_only=True)
        return lambda: model.tokenize(text)

    def detokenize(self) -> Call:
        """Put together the text of many tokens."""
        model, tokens = self.load(), [300] * 5_000_000
        return lambda: model.detokenize(tokens)

    def render(self, source: str) -> Call:
        """Try a template, which renders it."""
        model = self.load()

        def call() -> None:
            with suppress(Error):  # after a second
                ChatTemplate(model, source)

        return call

    def compile(self, **options: Any) -> Call:
        """Open a stream, whose grammar is compiled for that."""
        model = self.load()
        return lambda: model.stream("x", **options).close()

    def generate(self, prompt: str | list[int] = "x", **options: Any) -> Call:
        """Generate."""
        model = self.load(n_ctx=8192, n_batch=8192)
        settings: dict[str, Any] = {"max_tokens": 1000, **options}
        return lambda: model.generate(prompt, **settings)

    def beside_a_batch(self) -> Call:
        """Generate while a batch on the same model reads its prompts."""
        model = self.load(n_ctx=8192)

        def batches() -> None:
            for _ in range(99):
                list(model.generate_many([[5] * 4000] * 2, max_tokens=1))

        threading.Thread(target=batches, daemon=True).start()
        time.sleep(0.2)
        return lambda: model.generate([5] * 4000, max_tokens=100)

    def eval(self) -> Call:
        """Evaluate a long prompt."""
        model = self.load(n_ctx=8192, n_batch=8192)

        def call() -> None:
            model.reset()
            model.eval([5] * 8000)

        return call

    def generate_many(self) -> Call:
        """Generate eight replies at a time."""
        model = self.load(n_ctx=1024)
        return lambda: list(model.generate_many([[5] * 500] * 8, max_tokens=200))

    def close(self) -> Call:
        """Close a model that another thread is in the middle of a prompt with."""

        def call() -> None:
            model = self.load(n_ctx=8192, n_batch=8192)
            stream = model.stream([5] * 8000)
            busy = threading.Thread(target=lambda: list(stream), daemon=True)
            busy.start()
            time.sleep(0.05)
            model.close()
            busy.join()

        return call

    def dry(self) -> Call:
        """Sample with DRY, which looks at all tokens."""
        sampler = Sampler(dry_multiplier=1.0, dry_last_n=-1, dry_sequence_breakers=(), seed=1)
        for i in range(200_000):
            sampler.accept(i % 3)
        row = np.zeros(8192, np.float32)
        return lambda: sampler.sample(row)

    def restore(self) -> Call:
        """Set the state of a sampler that has drawn for years."""
        sampler = Sampler(seed=1)
        state = sampler.state | {"n_draws": 2**32}

        def call() -> None:
            sampler.state = state

        return call

    def header(self) -> Path:
        """Write a file of gpt-oss-120b's size."""
        return write_header(self.folder / "header.gguf", "gpt-oss-120b", vocabulary=True)

    def read_header(self) -> Call:
        """Read a header with a large vocabulary."""
        file = self.header()
        return lambda: ModelInfo.from_file(file)

    def plan(self) -> Call:
        """Plan for a GPU."""
        info = ModelInfo.from_file(self.header())
        hardware = Hardware.given(ram="128GiB", vram="24GiB", n_threads=8)
        return lambda: overspill.plan(info, hardware=hardware)

    def chat(self, n_characters: int) -> Chat:
        """Return a conversation of so many characters."""
        model = self.load()
        model.chat_template = ChatTemplate(model, "{% for m in messages %}{{ m.content }}{% endfor %}")
        chat = Chat(model)
        chat.messages = [{"role": "user", "content": "word " * 20} for _ in range(n_characters // 100)]
        return chat

    def render_chat(self) -> Call:
        """Render it."""
        chat = self.chat(5_000_000)
        return lambda: chat.model.chat_template.render(chat.messages)

    def save_chat(self) -> Call:
        """Save it."""
        chat = self.chat(20_000_000)
        return lambda: chat.save(self.folder / "chat.json")

    def load_chat(self) -> Call:
        """Load it."""
        chat, file = self.chat(20_000_000), self.folder / "chat.json"
        chat.save(file)
        return lambda: Chat.load(file, chat.model)

    def read_reply(self) -> Call:
        """Read a long reply, token by token."""
        chat = self.chat(100)
        form = chat.model.chat_template.prepare("Hello").form

        def call() -> None:
            reader = form.new_reader()
            for _ in range(100_000):
                reader.add("word " * 4)
            reader.finish(True)

        return call

    def measure(self) -> Call:
        """Measure this machine."""
        info = ModelInfo.from_file(self.path)
        return lambda: Hardware.here(info, n_threads=1, refresh=True)


MIXED = "a- \ue000 Hello " * 400_000
MANY_RULES = "\n".join(f'r{i} ::= "{i}" [a-z]*' for i in range(30_000))
MANY_RULES += "\nroot ::= " + " | ".join(f"r{i}" for i in range(30_000))
AMBIGUOUS = "root ::= " + " | ".join(f'[ -~]* "{i}"' for i in range(3000))
PROPERTIES = {f"property {i}": {"type": "string", "maxLength": 9} for i in range(10_000)}
FOREVER = "{% for i in range(9999) %}{% for j in range(9999) %}{{ i }}{% endfor %}{% endfor %}"
SLOW_FILTER = "{% for i in range(9999) %}{{ ('word ' * 9999) | title | length }}{% endfor %}"

CALLS: dict[str, Callable[[Bench], Call]] = {
    "tokenize, SPM": lambda bench: bench.tokenize("llama-spm", MIXED),
    "tokenize, BPE": lambda bench: bench.tokenize("gpt-2", MIXED),
    "tokenize, one word of BPE": lambda bench: bench.tokenize("gpt-2", "a" * 4_000_000),
    "tokenize, dashes in BPE": lambda bench: bench.tokenize("deepseek-llm", "-" * 4_000_000),
    "tokenize, WPM": lambda bench: bench.tokenize("bert-bge", MIXED),
    "tokenize, UGM": lambda bench: bench.tokenize("nomic-bert-moe", MIXED),
    "tokenize, Gemma 4": lambda bench: bench.tokenize("gemma-4", MIXED),
    "detokenize": Bench.detokenize,
    "template that never ends": lambda bench: bench.render(FOREVER),
    "template of a slow filter": lambda bench: bench.render(SLOW_FILTER),
    "template of long messages": Bench.render_chat,
    "GBNF of many rules": lambda bench: bench.compile(grammar=MANY_RULES),
    "GBNF of repetitions": lambda bench: bench.compile(grammar='root ::= (("a"{0,40}){0,40}){0,40}'),
    "JSON schema": lambda bench: bench.compile(json_schema={"type": "object", "properties": PROPERTIES}),
    "draws with a grammar": lambda bench: bench.generate(grammar="root ::= [ -~]*", mirostat=2),
    "draws with an ambiguous grammar": lambda bench: bench.generate(grammar=AMBIGUOUS, mirostat=2),
    "ModelInfo": Bench.read_header,
    "plan": Bench.plan,
    "load": lambda bench: lambda: bench.load(load_mode="read", check_tensors=True).close(),
    "stream": Bench.generate,
    "stream of a long prompt": lambda bench: bench.generate([5] * 8000),
    "stream beside a batch": Bench.beside_a_batch,
    "eval of a long prompt": Bench.eval,
    "generate_many": Bench.generate_many,
    "close": Bench.close,
    "DRY of all tokens": Bench.dry,
    "DRY of a prompt": lambda bench: bench.generate([5, 6] * 4000, dry_multiplier=1.0, dry_last_n=-1),
    "Sampler.state": Bench.restore,
    "reading a reply": Bench.read_reply,
    "Chat.load": Bench.load_chat,
    "Chat.save": Bench.save_chat,
    "Hardware.here": Bench.measure,
    "bench": lambda bench: lambda: overspill.bench(bench.path, n_threads=1),
    "tune": lambda bench: lambda: overspill.tune(bench.path, n_ctx=128),
    "compare": lambda bench: lambda: overspill.compare([bench.path] * 2, "Hello", max_tokens=2000),
    "devices": lambda bench: overspill.devices,
}
# What is done by then is returned.
RETURN_WHAT_THEY_HAVE = ("tune", "compare")


def main() -> None:
    """Interrupt one."""
    name, *files = sys.argv[1:]
    call = CALLS[name](Bench(*map(Path, files)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sent: list[float] = []

    def interrupt() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    faulthandler.dump_traceback_later(HANG_S, exit=True)
    threading.Timer(0.7, interrupt).start()
    try:
        while not (sent and name in RETURN_WHAT_THEY_HAVE):
            call()
    except KeyboardInterrupt:
        pass
    print(json.dumps(time.monotonic() - sent[0]), flush=True)  # noqa: T201
    os._exit(0)


if __name__ == "__main__":
    main()
