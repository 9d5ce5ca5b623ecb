"""The command line of the comparison, in plain Python: run.sh looks for mistakes in it before it builds anything."""

from __future__ import annotations

import re
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SHAPES = ("gpt-oss-20b", "gpt-oss-120b", "gpt-oss-2-layers")


@dataclass(frozen=True)
class Options:
    """What is compared, and how."""

    shapes: list[str]
    device: str
    rpc: str | None
    vram: str
    n_ctx: int
    prompt_tokens: int
    long_prompt_tokens: int
    tokens: int
    rounds: int
    threads: int | None
    json: Path | None

    @property
    def depth(self) -> int:
        """Tokens in the context halfway through a reply, for which speeds are predicted."""
        return self.prompt_tokens + self.tokens // 2


def _size(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)? *[KMGT]i?B", text, re.IGNORECASE):
        raise ArgumentTypeError(f'must be a size with its unit, such as "24GB" or "24GiB", not "{text}"')
    return text


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ArgumentTypeError(f"must be an integer from 0, not {text}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"must be an integer from 1, not {text}")
    return int(text)


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Return the options, or end the program with what is wrong about them."""
    parser = ArgumentParser(
        usage="run.sh [--arch ARCHITECTURE] [OPTION ...]",
        description="Build for the GPU at hand, and compare ways to place gpt-oss on it and in RAM.",
        epilog="--arch, which comes first, is a CMAKE_CUDA_ARCHITECTURES value to build for instead.",
    )
    add = parser.add_argument
    add("--shape", action="append", choices=SHAPES, help="may be given again; default: gpt-oss-20b and gpt-oss-120b")
    add(
        "--vram", type=_size, default="24GB", help="of the device, 1 GiB that stays free included; default: %(default)s"
    )
    add("--device", metavar="NAME", help="llama.cpp's name of it; default: CUDA0, with --rpc RPC0")
    add("--rpc", metavar="HOST:PORT", help="a server (overspill serve-device) whose device stands for the GPU")
    add("--n-ctx", type=_positive, default=8192, metavar="N", help="tokens of context; default: %(default)s")
    add("--prompt-tokens", type=_positive, default=512, metavar="N", help="default: %(default)s")
    add("--long-prompt-tokens", type=_count, default=4096, metavar="N", help="0 for none; default: %(default)s")
    add("--tokens", type=_positive, default=64, metavar="N", help="that are decoded, from 2; default: %(default)s")
    add("--rounds", type=_positive, default=3, metavar="N", help="of which the best counts; default: %(default)s")
    add("--threads", type=_positive, metavar="N", help="of the CPU; default: its physical cores")
    add("--json", type=Path, metavar="FILE", help="write everything to this file, too")
    given = parser.parse_args(arguments)
    if given.tokens < 2:
        parser.error("--tokens must be at least 2: a speed is that of the tokens after the first")
    if given.prompt_tokens + given.tokens > given.n_ctx:
        parser.error("--n-ctx has no room for --prompt-tokens and --tokens together")
    if given.long_prompt_tokens + given.tokens > given.n_ctx:
        parser.error("--n-ctx has no room for --long-prompt-tokens and --tokens together")
    return Options(
        given.shape or list(SHAPES[:2]),
        given.device or ("RPC0" if given.rpc else "CUDA0"),
        given.rpc,
        given.vram,
        given.n_ctx,
        given.prompt_tokens,
        given.long_prompt_tokens,
        given.tokens,
        given.rounds,
        given.threads,
        given.json,
    )


if __name__ == "__main__":
    parse()
