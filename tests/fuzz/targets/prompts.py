"""Prompts of up to 200,000 characters of every kind, for every way of cutting them into words and tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

import overspill
from fuzz.gguf_models import Model, byte_vocabulary, key_of, pre_tokenizers
from fuzz.mutators import TEXTS, log_uniform
from fuzz.targets.gguf_files import check_message
from model_files import llama_cpp_folder
from overspill import Error

__all__ = ["Prompts"]

_MOST_CHARACTERS = 200_000
# Vocabularies of other kinds than byte-level, which bring their own way of cutting.
_FILES = ("llama-spm", "phi-3", "bert-bge", "nomic-bert-moe", "gemma-4", "baichuan")
# These do not write bytes as letters, so a byte-level vocabulary is not theirs.
_NOT_BYTES = ("gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace")
_ALPHABETS = (
    *(
        "abcdefghijklmnopqrstuvwxyz",
        "ABCDEFGHIJ",
        "aB",
        "0123456789",
        " ",
        "\n",
        "\r\n",
        "\t",
        " \n",
        "-",
        "=",
        ".",
        "_",
    ),
    *(
        "!?.,;:",
        "'s'll'RE't",
        '"',
        "()[]{}<>",
        "#*`~|\\/",
        "$€£",
        "αβγδεζ",
        "абвгд",
        "אבגד",
        "عربي",
        "हिन्दी",
        "ไทยภาษา",
    ),
    *(
        "日本語漢字",
        "あいうえお",
        "カタカナ",
        "한국어",
        "éàüñ",
        "e\u0301\u0302",
        "🙂🎉",
        "👩‍👩‍👧",
        "\u200b\u200d",
        "\u00a0\u3000",
    ),
    *(
        "\ue000\U000f0000",
        "\u0378\U000e0fff",
        "\x00\x01\x7f\x85",
        "\ufffd\ufffe",
        "١٢٣",
        "Ⅳ½²",
        "ǅǈ",
        "𝔘𝔫𝔦",
        "a1",
        "a.",
        "a b",
    ),
)


@dataclass(frozen=True)
class Prompt:
    """A text, and the vocabulary that it is for: a name of a pre-tokenizer, or of a file."""

    vocabulary: str
    text: str

    def __repr__(self) -> str:
        """Return the text's runs, which are long."""
        runs: list[list[str | int]] = []
        for character in self.text:
            if runs and runs[-1][0] == character:
                runs[-1] = [character, int(runs[-1][1]) + 1]
            else:
                runs.append([character, 1])
        shown = " ".join(f"{text!r}*{n}" if n != 1 else repr(text) for text, n in runs[:60])
        return f"Prompt({self.vocabulary}, {len(self.text)} characters: {shown}{' ...' if len(runs) > 60 else ''})"


class Prompts:
    """See the module."""

    def __init__(self, folder: Path) -> None:
        """Keep files in ``folder``."""
        self._folder = folder
        self._models: dict[str, overspill.Model] = {}

    def make(self, random: Random) -> Prompt:
        """Return runs of characters, mostly of one kind each."""
        vocabulary = random.choice(_FILES if random.random() < 0.15 else pre_tokenizers())
        text = ""
        for _ in range(1 + int(random.expovariate(0.7))):
            kind = random.random()
            alphabet = random.choice(_ALPHABETS)
            if kind < 0.4:
                piece = random.choice(alphabet)
            elif kind < 0.6:
                piece = alphabet
            elif kind < 0.7:
                piece = random.choice(TEXTS) or "a"
            else:
                other = random.choice(_ALPHABETS) if random.random() < 0.3 else alphabet
                piece = "".join(random.choice(alphabet + other) for _ in range(log_uniform(random, 2000)))
            text += piece * log_uniform(random, max(1, (_MOST_CHARACTERS - len(text)) // len(piece)))
            text = text[:_MOST_CHARACTERS]
        return Prompt(vocabulary, text)

    def check(self, case: Prompt) -> None:
        """Tokenize it; the tokens of a byte-level vocabulary are the text again."""
        try:
            model = self._model(case.vocabulary)
            tokens = model.tokenize(case.text, add_special=False, parse_special=False)
        except Error as error:
            check_message(error)
            self._models.pop(case.vocabulary, None)  # it may be of no more use
            return
        assert all(0 <= token < model.n_vocab for token in tokens)
        if case.vocabulary not in (*_FILES, *_NOT_BYTES):
            again = b"".join(model.token_bytes(token) for token in tokens)
            assert again == case.text.encode(), "the tokens are another text"

    def _model(self, vocabulary: str) -> overspill.Model:
        if vocabulary not in self._models:
            self._models[vocabulary] = overspill.Model(self._path(vocabulary), vocab_only=True)
        return self._models[vocabulary]

    def _path(self, vocabulary: str) -> Path:
        if vocabulary in _FILES:
            return llama_cpp_folder() / "models" / f"ggml-vocab-{vocabulary}.gguf"
        keys = {
            "general.architecture": "llama",
            **byte_vocabulary(8192),
            "tokenizer.ggml.pre": vocabulary,
        }
        file = self._folder / f"{vocabulary}.gguf"
        file.write_bytes(Model(tuple(key_of(name, value) for name, value in keys.items()), ()).to_bytes())
        return file
