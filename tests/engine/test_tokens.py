"""Text to tokens and back."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import overspill
from model_files import llama_cpp_folder
from overspill import Model

TEXTS = ["Hello, world!", "  two  spaces\n\ttab", "日本語のテキスト", "naïve café 🙂🏳️‍🌈", "x" * 3000, "a\0b"]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_the_tokens_are_the_text(smollm2: Model, text: str) -> None:
    """A byte-level vocabulary loses nothing."""
    tokens = smollm2.tokenize(text, add_special=False, parse_special=False)
    assert b"".join(map(smollm2.token_bytes, tokens)) == text.encode()
    assert smollm2.detokenize(tokens) == text


@pytest.fixture(scope="session")
def gpt2(vocab_path: Path) -> Iterator[Model]:
    """Return GPT-2's vocabulary."""
    with Model(vocab_path, vocab_only=True) as model:
        yield model


@given(text=st.text(max_size=60))
def test_any_text_comes_back(gpt2: Model, text: str) -> None:
    """Whatever text, special tokens' names included, is text when it is not parsed."""
    tokens = gpt2.tokenize(text, add_special=False, parse_special=False)
    assert gpt2.detokenize(tokens) == text


def test_special_tokens(gemma: Model, smollm2: Model) -> None:
    """They are added and recognised only when asked for, and named by their role."""
    bos = gemma.special_tokens["bos"]
    assert gemma.tokenize("Hi") == [bos, *gemma.tokenize("Hi", add_special=False)]
    mark = "<|im_start|>"
    (parsed,) = smollm2.tokenize(mark, add_special=False)
    assert len(smollm2.tokenize(mark, add_special=False, parse_special=False)) > 1
    assert smollm2.token_bytes(parsed) == mark.encode()
    assert smollm2.token_bytes(parsed, special=False) == b""
    assert smollm2.detokenize([parsed]) == mark
    assert smollm2.detokenize([parsed], skip_special=True) == ""
    assert smollm2.is_end_of_generation(smollm2.special_tokens["eos"])
    assert not smollm2.is_end_of_generation(smollm2.tokenize("a", add_special=False)[0])


def test_bytes_that_are_no_text(smollm2: Model) -> None:
    """A part of a character is bytes; as text it is replaced."""
    first, *rest = smollm2.tokenize("🏳", add_special=False)
    assert rest, "one token for the whole character: choose another"
    assert smollm2.detokenize([first]) == "\ufffd"


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda model: model.detokenize([0, model.n_vocab]), ValueError, "not in the vocabulary"),
        (lambda model: model.token_bytes(-1), ValueError, "token must be"),
        (lambda model: model.token_bytes(model.n_vocab), ValueError, "not in the vocabulary"),
        (lambda model: model.token_bytes("a"), TypeError, "token must be an integer"),
        (lambda model: model.is_end_of_generation(2**40), ValueError, "token must be"),
        (lambda model: model.tokenize(b"bytes"), TypeError, "text must be a string"),
    ],
)
def test_bad_tokens(smollm2: Model, call: object, error: type[Exception], text: str) -> None:
    """Ids outside the vocabulary never reach llama.cpp."""
    assert callable(call)
    with pytest.raises(error, match=text):
        call(smollm2)


# The names that a header may give its pre-tokenizer; each is a list of expressions in llama-vocab.cpp.
VOCABULARY_SOURCE = (llama_cpp_folder() / "src" / "llama-vocab.cpp").read_text()
PRE_TOKENIZERS = sorted(set(re.findall(r'tokenizer_pre == "([^"]+)"', VOCABULARY_SOURCE)))
# These are of vocabularies that do not write bytes as GPT-2's does, so that some texts come back otherwise.
NOT_BYTE_LEVEL = {"gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace"}

RUNS = {
    "dashes": "-",
    "letters": "a",
    "capitals": "A",
    "both cases": "aB",
    "letters with accents": "e\u0301",
    "accents": "\u0301",
    "lines": "\n",
    "other lines": "\r\n",
    "spaces": " ",
    "wide spaces": "\u3000",
    "letters and spaces": "a b ",
    "digits": "1",
    "wide digits": "２",
    "Chinese": "龥",
    "Korean": "한",
    "emoji": "🙂",
    "apostrophes": "'s",
    "brackets": "([{",
    "zeros": "\0",
    "almost a token": "<sentinel:1",
    "control tokens": "<|endoftext|>",
    "mixed": "aé1- \n日",
}

# Tokenizes runs in a thread whose stack is small, so that what calls itself for each character dies early; a line for
# each run says how many tokens there are and whether they are the text.
RUNS_TRIAL = """
import itertools, json, sys, threading
from overspill import Model
def work():
    for path, cases in itertools.groupby(json.load(sys.stdin), lambda case: case[0]):
        with Model(path, vocab_only=True) as model:
            for _, unit, length in cases:
                print(path, repr(unit), length, end=" ", flush=True)
                text = (unit * length)[:length - 1] + "x"
                tokens = model.tokenize(text, add_special=False, parse_special=False)
                print(len(tokens), b"".join(map(model.token_bytes, tokens)) == text.encode(), flush=True)
threading.stack_size(256 << 10)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def with_text(whole: bytes, key: str, value: str) -> bytes:
    """Return a file with another text under a key of its header."""
    entry = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", 8)
    start = whole.index(entry) + len(entry)
    (length,) = struct.unpack_from("<Q", whole, start)
    return whole[:start] + struct.pack("<Q", len(value)) + value.encode() + whole[start + 8 + length :]


def with_pre_tokenizer(vocabulary: bytes, name: str) -> bytes:
    """Return a vocabulary's file with another pre-tokenizer."""
    if name == "whitespace":  # which has a tokenizer of its own
        vocabulary = with_text(vocabulary, "tokenizer.ggml.model", name)
    return with_text(vocabulary, "tokenizer.ggml.pre", name)


def check_runs(folder: Path, vocabulary: Path, cases: list[tuple[str, str, int]]) -> None:
    """Tokenize runs with pre-tokenizers in a child process, and look at what it says."""
    whole = vocabulary.read_bytes()
    files = {name: folder / f"{name}.gguf" for name, _, _ in cases}
    for name, file in files.items():
        file.write_bytes(with_pre_tokenizer(whole, name))
    given = json.dumps([(str(files[name]), RUNS[run], length) for name, run, length in cases])
    command = [sys.executable, "-c", RUNS_TRIAL]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=600)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"died of {done.returncode} at {lines[-1:]}: {done.stderr[-1500:]}"
    assert len(lines) == len(cases)
    for line, (name, _, _) in zip(lines, cases, strict=True):
        n_tokens, is_text = line.split()[-2:]
        assert int(n_tokens) > 0, line
        assert name in NOT_BYTE_LEVEL or is_text == "True", line


def test_names_of_pre_tokenizers() -> None:
    """They are read from the source of llama.cpp, which has ninety."""
    assert len(PRE_TOKENIZERS) > 80
    assert {"gpt-4o", "llama4", "deepseek-llm", "superbpe", "qwen2"} <= set(PRE_TOKENIZERS)


def test_long_runs(tmp_path: Path, vocab_path: Path) -> None:
    """200,000 characters of one kind overflow no stack, and take no time that grows with their square."""
    cases = [("llama4", "dashes"), ("gpt-4o", "letters"), ("deepseek-llm", "spaces"), ("superbpe", "digits")]
    check_runs(tmp_path, vocab_path, [(name, run, 200_000) for name, run in cases])


@pytest.mark.slow
def test_long_runs_of_all_kinds(tmp_path: Path, vocab_path: Path) -> None:
    """The same for each pre-tokenizer and kind of run; all are tried at length, if not with each other."""
    runs = list(RUNS)
    check_runs(
        tmp_path,
        vocab_path,
        [
            (name, run, 200_000 if number % len(runs) == place else 10_000)
            for number, name in enumerate(PRE_TOKENIZERS)
            for place, run in enumerate(runs)
        ],
    )


def expressions() -> list[list[str]]:
    """Return the expressions of each pre-tokenizer, from the source of llama.cpp."""
    source = re.sub(r"^\s*//.*$", "", VOCABULARY_SOURCE, flags=re.MULTILINE)
    found = []
    for block in re.findall(r"regex_exprs = \{(.*?)\n {16}\};", source, flags=re.DOTALL):
        literals = re.findall(r'^\s*("(?:[^"\\]|\\.)*"),', block, flags=re.MULTILINE)
        found.append([ast.literal_eval(literal) for literal in literals])
    return found


@pytest.mark.slow
def test_words_are_those_of_the_standard_library(upstream_tools: Path) -> None:
    """Texts of every kind are split as llama.cpp's own code does it, with std::regex."""
    pieces = [
        *RUNS.values(),
        *'aBéЖΩǅʰµⅷ½²٣日かカ한ไا،。、٪$+<=>^`|~!?.,_/\\"',
        "\t",
        "\n\n\n",
        "   ",
        "\u00a0",
        "\u2003",
    ]
    pieces += ["\u0085", "\u200b", "\u0300", "12345678", "'LL", "'re", " the quick", "IMGIMGABZ", "\U0010ffff", "𐐀"]
    random = Random(5)
    texts = ["".join(random.choices(pieces, k=random.randrange(1, 40))) for _ in range(120)]
    texts += ["".join(random.choices(random.sample(pieces, 3), k=random.randrange(1, 40))) for _ in range(120)]
    texts += [run * 300 for run in RUNS.values()]
    lists = expressions()
    assert len(lists) == VOCABULARY_SOURCE.count("regex_exprs = {") > 30
    assert all(lists)
    given = "".join(f"{len(one)}\n" for one in (lists, texts))
    for group in (*lists, texts):
        given += f"{len(group)}\n" + "".join(f"{len(text.encode())}\n{text}\n" for text in group)
    done = subprocess.run([upstream_tools / "words"], input=given.encode(), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:] + done.stderr.decode()
    assert done.stdout.decode() == f"{len(lists) * len(texts)} alike\n"


def test_characters_that_no_token_has(vocabularies: Path) -> None:
    """Each is written in bytes, in a time that grows with their number."""
    text = "\ue000" * 200_000
    with Model(vocabularies / "ggml-vocab-llama-spm.gguf", vocab_only=True) as model:
        tokens = model.tokenize(text, add_special=False)
        assert model.detokenize(tokens).strip() == text
        assert len(tokens) == 3 * len(text) + 1


@pytest.mark.usefixtures("heeds_interrupts")
def test_an_interrupt_ends_it(vocabularies: Path) -> None:
    """Ctrl-C ends the tokenizing of a text that takes long, and the next one is none the worse."""
    with Model(vocabularies / "ggml-vocab-llama-spm.gguf", vocab_only=True) as model:
        timer = threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT])
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            for _ in range(200):
                model.tokenize("a- \ue000" * 200_000)
        assert model.tokenize("a", add_special=False)


def test_a_vocabulary_without_some_bytes(tmp_path: Path, vocabularies: Path) -> None:
    """What it cannot write is an error; the rest it can."""
    file = tmp_path / "model.gguf"
    file.write_bytes((vocabularies / "ggml-vocab-llama-spm.gguf").read_bytes().replace(b"<0xEE>", b"<0xee>"))
    with Model(file, vocab_only=True) as model:
        assert model.tokenize("Hello")
        with pytest.raises(overspill.Error, match="vocabulary is incomplete"):
            model.tokenize("\ue000")
