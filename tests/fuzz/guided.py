"""The same, led by coverage: ``python -m fuzz.guided TARGET [--runs N]`` with Atheris, or the fuzzers of Clang.

A target of ``python -m fuzz`` runs in Atheris, which has to be installed. The others are of the core alone, and built
by ``cmake --preset fuzz && cmake --build --preset fuzz``. Inputs that do harm stay in ``build/fuzz``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import FunctionType

from fuzz.gguf_models import BASES, Model, byte_vocabulary, key_of
from fuzz.runner import MEMORY_LIMIT_BYTES, WALL_LIMIT_S
from fuzz.targets import TARGETS
from fuzz.targets.chats import MARKS
from fuzz.targets.languages import grammar_seeds
from model_files import llama_cpp_folder

BUILT = Path(__file__).parents[2] / "build" / "fuzz"
NATIVE = ("gguf_header", "grammar", "reply_parser", "utf8_buffer")


def seeds(name: str) -> list[bytes]:
    """Return the inputs that a fuzzer of the core starts from."""
    match name:
        case "gguf_header":  # without the weights, which no reader of headers looks at
            return [base().to_bytes()[:30_000] for base in BASES.values()]
        case "grammar":
            return [text.encode() for text in grammar_seeds()]
        case "reply_parser":
            return [bytes([i, 0, i]) + mark.encode() for i, mark in enumerate(MARKS)]
        case _:
            return ["aé日🙂".encode(), b"\xf0\x9f\x98\xff\xc0\xaf"]


class _Bytes(Random):
    """Chance that is read from an input, so that a change of the input is a change of what is made of it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data, self._at = data, 0

    def getrandbits(self, k: int, /) -> int:
        """Return the next ``k`` bits, after the input's end any."""
        n = (k + 7) // 8
        taken = self._data[self._at : self._at + n]
        self._at += n
        return int.from_bytes(taken, "little") >> (8 * n - k) if len(taken) == n else super().getrandbits(k)

    def random(self) -> float:
        """Return a number from 0 to 1."""
        return self.getrandbits(53) / (1 << 53)


def _functions() -> Iterator[FunctionType]:
    """Yield the functions and methods of Overspill: Atheris's own hook does not see an editable install come."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "overspill":
            continue
        for value in list(vars(module).values()):
            for member in list(vars(value).values()) if isinstance(value, type) else [value]:
                found = [getattr(member, part, None) for part in ("fget", "func", "__func__")]
                function = next((one for one in found if one is not None), member)
                if isinstance(function, FunctionType) and function.__module__ == name:
                    yield function


def _python(name: str, runs: int) -> None:
    """Run a target in Atheris, which ends the process."""
    try:
        import atheris
    except ImportError:
        sys.exit(f"error: {name} needs Atheris, which is not installed: pip install --group fuzz")
    for function in _functions():
        atheris.instrument_func(function)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    target = TARGETS[name](folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    for seed in range(32):
        (corpus / str(seed)).write_bytes(Random(seed).randbytes(400))

    def try_one(data: bytes) -> None:
        target.check(target.make(_Bytes(data)))

    BUILT.mkdir(parents=True, exist_ok=True)
    limits = [f"-runs={runs}", f"-timeout={WALL_LIMIT_S:.0f}", "-seed=1", "-max_len=400", "-rss_limit_mb=4096"]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={BUILT}/{name}-", str(corpus)], try_one)
    atheris.Fuzz()


def _native(name: str, runs: int) -> int:
    program = BUILT / f"overspill_fuzz_{name}"
    if not program.is_file():
        sys.exit(f"error: {program} is not built: cmake --preset fuzz && cmake --build --preset fuzz")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        corpus, model = Path(folder) / "corpus", Path(folder) / "model.gguf"
        corpus.mkdir()
        for number, seed in enumerate(seeds(name)):
            (corpus / str(number)).write_bytes(seed)
        keys = {"general.architecture": "llama", **byte_vocabulary()}
        model.write_bytes(Model(tuple(key_of(key, value) for key, value in keys.items()), ()).to_bytes())
        environment = {
            **os.environ,
            "OVERSPILL_FUZZ_FOLDER": folder,
            "OVERSPILL_FUZZ_MODEL": str(model),
            "OVERSPILL_FUZZ_TEMPLATES": str(llama_cpp_folder() / "models" / "templates"),
        }
        limits = [
            f"-runs={runs}",
            f"-timeout={WALL_LIMIT_S:.0f}",
            "-seed=1",
            f"-rss_limit_mb={MEMORY_LIMIT_BYTES >> 20}",
        ]
        command = [str(program), str(corpus), *limits, f"-artifact_prefix={BUILT}/{name}-", "-max_len=30000"]
        return subprocess.run(command, env=environment).returncode


def main() -> int:
    """Run one; return 0 if all inputs were tried and none did harm."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.guided", description="Try inputs, led by coverage.")
    parser.add_argument("target", choices=[*NATIVE, *TARGETS])
    parser.add_argument("--runs", type=int, default=10_000, help="inputs; -1 for no end")
    asked = parser.parse_args()
    if asked.target in NATIVE:
        return _native(asked.target, asked.runs)
    _python(asked.target, asked.runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
