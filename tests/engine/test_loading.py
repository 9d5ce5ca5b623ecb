"""Files that are models, and files that are not: an error that names the file, never a dead interpreter."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, get_args

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import overspill
from header_files import dense, write_file
from model_files import llama_cpp_folder, write_tiny_gpt_oss
from overspill import Model, ModelInfo, ModelLoadError, OutOfMemoryError
from overspill.base.host import available_ram_bytes
from overspill.base.values import LoadMode, Switch
from programs import in_process
from sweeps import sweep

PROMPT = "Once upon a time"


def greedy(model: Model) -> list[int]:
    """Return token ids that are the same each time."""
    return [token.id for token in model.generate(PROMPT, temperature=0, max_tokens=16).tokens]


def load(path: Path) -> Model:
    """Load with little memory."""
    return Model(path, n_ctx=64, n_threads=2)


@pytest.fixture(scope="module")
def whole(tiny_gpt_oss_path: Path) -> bytes:
    """Return the bytes of a good file."""
    return tiny_gpt_oss_path.read_bytes()


@pytest.fixture(scope="module")
def header_size(tiny_gpt_oss_path: Path) -> int:
    """Return where the header ends and the weights begin."""
    return int(gguf.GGUFReader(tiny_gpt_oss_path).data_offset)


def refused(path: Path, *texts: str) -> None:
    """Check that loading raises an error that names the file and holds one of the texts."""
    with pytest.raises(ModelLoadError) as raised:
        load(path)
    message = str(raised.value)
    assert message.startswith(str(path))
    assert any(text in message for text in texts), message
    assert "\n" not in message


def test_what_is_no_model_file(tmp_path: Path) -> None:
    """Missing, a directory, empty, and things that are not regular files."""
    refused(tmp_path / "missing.gguf", "no such file")
    refused(tmp_path, "is a directory")
    empty = tmp_path / "empty.gguf"
    empty.touch()
    refused(empty, "is empty")
    refused(Path("/dev/null"), "is not a regular file")


@pytest.mark.parametrize("content", [b"This is a text.\n" * 100, b"GGU", b"ggjt" + bytes(100), bytes(100), b"GGML" * 9])
def test_what_is_not_gguf(tmp_path: Path, content: bytes) -> None:
    """Text, another format, zeros."""
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    refused(file, "is not a GGUF file")


@pytest.mark.parametrize("version", [0, 1, 4, 0x03000000, 2**32 - 1])
def test_versions_that_nobody_reads(tmp_path: Path, whole: bytes, version: int) -> None:
    """Too old, too new, or of the other byte order."""
    file = tmp_path / "model.gguf"
    file.write_bytes(whole[:4] + struct.pack("<I", version) + whole[8:])
    refused(file, "version", "GGUFv1")


@pytest.mark.parametrize("tenth", range(10))
def test_truncated_in_the_header(tmp_path: Path, whole: bytes, header_size: int, tenth: int) -> None:
    """At ten places from the magic to the last tensor's entry."""
    file = tmp_path / "model.gguf"
    file.write_bytes(whole[: 4 + (header_size - 8) * tenth // 10])
    refused(file, "truncated")


@pytest.mark.parametrize("tenth", range(10))
def test_truncated_in_the_weights(tmp_path: Path, whole: bytes, header_size: int, tenth: int) -> None:
    """At ten places from the first weight to the last byte."""
    file = tmp_path / "model.gguf"
    file.write_bytes(whole[: header_size + (len(whole) - header_size - 1) * tenth // 9])
    refused(file, "corrupted or incomplete", "truncated")


def with_value(whole: bytes, key: str, kind: int, value: bytes) -> bytes:
    """Replace the type and value of a scalar key of four bytes."""
    start = whole.index(key.encode()) + len(key)
    return whole[:start] + struct.pack("<I", kind) + value + whole[start + 8 :]


def at(offset: int, value: bytes) -> Callable[[bytes], bytes]:
    """Return what overwrites a file at ``offset``."""
    return lambda whole: whole[:offset] + value + whole[offset + len(value) :]


def tensor_field(name: str, offset: int, value: bytes) -> Callable[[bytes], bytes]:
    """Return what overwrites a field of a tensor's entry: dimensions at 4, type and offset after them."""

    def overwrite(whole: bytes) -> bytes:
        start = whole.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + offset
        return whole[:start] + value + whole[start + len(value) :]

    return overwrite


ABSURD = {
    f"{what} {n}": at(offset, struct.pack("<Q", n))
    for what, offset in (("tensors", 8), ("keys", 16), ("key length", 24))
    for n in (2**63 + 1, 2**62, 2**40, 10**7)
}
MATRIX = "blk.0.attn_q.weight"  # two dimensions: entry of 4 + 2 * 8 + 4 + 8 bytes
EXPERTS = "blk.0.ffn_up_exps.weight"  # three
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    **ABSURD,
    "no keys": at(16, struct.pack("<Q", 0)),
    "no tensors": at(8, struct.pack("<Q", 0)),
    "one tensor less": lambda whole: at(8, struct.pack("<Q", struct.unpack_from("<Q", whole, 8)[0] - 1))(whole),
    "one tensor more": lambda whole: at(8, struct.pack("<Q", struct.unpack_from("<Q", whole, 8)[0] + 1))(whole),
    "too many dimensions": tensor_field(MATRIX, 0, struct.pack("<I", 5)),
    "dimension zero": tensor_field(MATRIX, 4, struct.pack("<q", 0)),
    "dimension negative": tensor_field(MATRIX, 4, struct.pack("<q", -256)),
    "dimension 2**62": tensor_field(MATRIX, 4, struct.pack("<q", 2**62)),
    "dimension no multiple of a block": tensor_field(MATRIX, 4, struct.pack("<q", 257)),
    "dimension of another size": tensor_field(MATRIX, 12, struct.pack("<q", 256)),
    "type out of range": tensor_field(MATRIX, 20, struct.pack("<I", 1000)),
    "type removed": tensor_field(MATRIX, 20, struct.pack("<I", 4)),
    "type of another size": tensor_field(MATRIX, 20, struct.pack("<I", 0)),
    "offset not aligned": tensor_field(MATRIX, 24, struct.pack("<Q", 33)),
    "offset out of the file": tensor_field(MATRIX, 24, struct.pack("<Q", 2**40)),
    "offset of another tensor": tensor_field(MATRIX, 24, struct.pack("<Q", 0)),
    "experts of another number": tensor_field(EXPERTS, 20, struct.pack("<q", 9)),
    "architecture unknown": lambda whole: whole.replace(b"gpt-oss", b"gpt-oops"[:7]),
    "tensor renamed": lambda whole: whole.replace(MATRIX.encode(), MATRIX.encode()[:-1] + b"X"),
    "tensor twice": lambda whole: whole.replace(b"blk.1.attn_q.weight", MATRIX.encode()),
    "key twice": lambda whole: whole.replace(b"gpt-oss.expert_used_count", b"gpt-oss.embedding_length\0"[:25]),
    "key of another type": lambda whole: with_value(whole, "gpt-oss.block_count", 6, struct.pack("<f", 4)),
    "layers 0": lambda whole: with_value(whole, "gpt-oss.block_count", 4, struct.pack("<I", 0)),
    "layers 2**31": lambda whole: with_value(whole, "gpt-oss.block_count", 4, struct.pack("<I", 2**31)),
    "layers 1000": lambda whole: with_value(whole, "gpt-oss.block_count", 4, struct.pack("<I", 1000)),
    "heads 0": lambda whole: with_value(whole, "gpt-oss.attention.head_count", 4, struct.pack("<I", 0)),
    "heads 7": lambda whole: with_value(whole, "gpt-oss.attention.head_count", 4, struct.pack("<I", 7)),
    "KV heads 0": lambda whole: with_value(whole, "gpt-oss.attention.head_count_kv", 4, struct.pack("<I", 0)),
    "KV heads 3": lambda whole: with_value(whole, "gpt-oss.attention.head_count_kv", 4, struct.pack("<I", 3)),
    "width 0": lambda whole: with_value(whole, "gpt-oss.embedding_length", 4, struct.pack("<I", 0)),
    "width 255": lambda whole: with_value(whole, "gpt-oss.embedding_length", 4, struct.pack("<I", 255)),
    "head width 0": lambda whole: with_value(whole, "gpt-oss.attention.key_length", 4, struct.pack("<I", 0)),
    "head width 63": lambda whole: with_value(whole, "gpt-oss.attention.key_length", 4, struct.pack("<I", 63)),
    "experts 0": lambda whole: with_value(whole, "gpt-oss.expert_count", 4, struct.pack("<I", 0)),
    "experts 2**30": lambda whole: with_value(whole, "gpt-oss.expert_count", 4, struct.pack("<I", 2**30)),
    "experts used 9": lambda whole: with_value(whole, "gpt-oss.expert_used_count", 4, struct.pack("<I", 9)),
    "experts used 0": lambda whole: with_value(whole, "gpt-oss.expert_used_count", 4, struct.pack("<I", 0)),
    "rope scaling unknown": lambda whole: whole.replace(b"\x04\0\0\0\0\0\0\0yarn", b"\x04\0\0\0\0\0\0\0yarX"),
    "window 0": lambda whole: with_value(whole, "gpt-oss.attention.sliding_window", 4, struct.pack("<I", 0)),
    "eos out of range": lambda whole: with_value(whole, "tokenizer.ggml.eos_token_id", 4, struct.pack("<I", 2**31 + 5)),
    "tokenizer unknown": lambda whole: whole.replace(b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0gptX"),
    "pre-tokenizer unknown": lambda whole: whole.replace(b"\x05\0\0\0\0\0\0\0gpt-2", b"\x05\0\0\0\0\0\0\0gpt-X"),
    "merges of nonsense": lambda whole: whole.replace("Ġ t".encode(), b"xxxx"),
}

# Overwrites parts of a file, loads it and generates with it: fine, or an Error; anything else is
# the death that must not be, and the last line says of what.
TRIAL = """
import json, sys
import overspill
path = sys.argv[1]
for patches in json.loads(sys.argv[2]):
    print(patches, flush=True)
    with open(path, "r+b") as file:
        before = []
        for offset, value in patches:
            file.seek(offset)
            before.append((offset, file.read(len(value) // 2)))
            file.seek(offset)
            file.write(bytes.fromhex(value))
    try:
        with overspill.Model(path, n_ctx=64, n_threads=1) as model:
            model.generate([1, 2, 3], max_tokens=2)
        print("loaded")
    except overspill.Error as error:
        print("refused:", str(error).splitlines()[0])
    with open(path, "r+b") as file:
        for offset, value in before:
            file.seek(offset)
            file.write(value)
"""


Patches = list[tuple[int, str]]


def tried(file: Path, patches: list[Patches]) -> list[str]:
    """Load the file with each of the patches, in a process of its own, and in another after one that it dies of."""
    outcomes: list[str] = []
    while len(outcomes) < len(patches):
        whole = file.read_bytes()
        command = [sys.executable, "-c", TRIAL, str(file), json.dumps(patches[len(outcomes) :])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        outcomes += done.stdout.splitlines()[1::2]
        if done.returncode != 0:
            outcomes.append(f"died of {done.returncode}: {done.stderr[-1500:]}")
            file.write_bytes(whole)
    return outcomes


def patches_of(whole: bytes, damaged: bytes) -> Patches:
    """Return what makes a file of another that is as long."""
    assert len(damaged) == len(whole)
    places = np.flatnonzero(np.frombuffer(damaged, np.uint8) != np.frombuffer(whole, np.uint8))
    runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    return [(int(run[0]), damaged[run[0] : run[-1] + 1].hex()) for run in runs]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, whole: bytes) -> dict[str, str]:
    """Return what comes of each kind of damage."""
    file = tmp_path_factory.mktemp("damaged") / "model.gguf"
    file.write_bytes(whole)
    patches = [patches_of(whole, damage(whole)) for damage in DAMAGE.values()]
    return dict(zip(DAMAGE, (text.replace(str(file), "FILE") for text in tried(file, patches)), strict=True))


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_survived(outcomes: dict[str, str], name: str) -> None:
    """Counts that cannot be are refused; of the rest llama.cpp decides; nothing kills the interpreter."""
    expected = ("refused: FILE",) if name in ABSURD else ("refused: ", "loaded")
    assert outcomes[name].startswith(expected), outcomes[name]


@pytest.mark.slow
def test_flipped_bits_in_the_header_are_survived(tmp_path: Path, whole: bytes, tiny_gpt_oss_path: Path) -> None:
    """Random bits among the keys and the tensors' entries, hundreds of times."""
    random = Random(7)
    # Not the vocabulary, which is large and less interesting, and not what contradicts the tensors
    # in ways that llama.cpp asserts where it builds or computes its graph: a width, a tensor's type.
    contradictory = whole.index(b"gpt-oss.attention.value_length")
    places = [place for place in range(4, 1600) if not contradictory - 8 <= place < contradictory + 38]
    for tensor in gguf.GGUFReader(tiny_gpt_oss_path).tensors:
        name = tensor.name.encode()
        start = whole.index(struct.pack("<Q", len(name)) + name)
        kind = start + 8 + len(name) + 4 + 8 * len(tensor.shape)
        places += [*range(start, kind), *range(kind + 4, kind + 12)]
    patches = []
    for _ in range(400):
        offset = random.choice(places)
        patches.append([(offset, bytes([whole[offset] ^ (1 << random.randrange(8))]).hex())])
    file = tmp_path / "model.gguf"
    file.write_bytes(whole)
    outcomes = tried(file, patches)
    assert [outcome for outcome in outcomes if outcome.startswith("died")] == []
    assert sum(outcome.startswith("refused") for outcome in outcomes) > 100
    assert any(outcome == "loaded" for outcome in outcomes)


# What the header may say under each of llama.cpp's keys of an architecture.
KEYS = sorted(set(re.findall(r'"%s\.([^"]+)"', (llama_cpp_folder() / "src" / "llama-arch.cpp").read_text())))
VALUES: dict[str, tuple[int, bytes]] = {
    "zero": (4, struct.pack("<I", 0)),
    "2**32 - 1": (4, struct.pack("<I", 2**32 - 1)),
    "2**31 - 1": (4, struct.pack("<I", 2**31 - 1)),
    "large numbers": (9, struct.pack("<IQ4I", 4, 4, *[2**32 - 1] * 4)),
    "zeros": (9, struct.pack("<IQ4I", 4, 4, 0, 0, 0, 0)),
    "negative": (5, struct.pack("<i", -1)),
    "infinity": (6, struct.pack("<f", float("inf"))),
    "text": (8, struct.pack("<Q", 1) + b"a"),
    "texts": (9, struct.pack("<IQ", 8, 1) + struct.pack("<Q", 1) + b"a"),
    "too many": (9, struct.pack("<IQ", 4, 5000) + bytes(4 * 5000)),
}

# Writes a file with a key added at its beginning and the old entry renamed, plans it, loads it and generates with it;
# says what came of each.
KEY_TRIAL = """
import json, struct, sys
import overspill
hardware = overspill.Hardware.given(vram="8GiB", ram="16GiB", n_threads=1)
whole, path, header_size = open(sys.argv[1], "rb").read(), sys.argv[2], int(sys.argv[3])
def tried(work):
    try:
        work()
        return "fine"
    except overspill.Error as error:
        return "refused: " + str(error).split("\\n")[0]
def generate():
    with overspill.Model(path, offload="cpu", n_ctx=64, n_threads=1) as model:
        model.generate([1, 2, 3], max_tokens=2)
def write(key, kind, value):
    name = struct.pack("<Q", len(key)) + key
    entry = name + struct.pack("<I", kind) + value
    fill = -(len(entry) + 8 + 7 + 4 + 8) % 32  # what follows is aligned
    entry += struct.pack("<Q", 7) + b"filling" + struct.pack("<IQ", 8, fill) + bytes(fill)
    (n_keys,) = struct.unpack_from("<Q", whole, 16)
    rest = whole[24:header_size].replace(name, name[:-1] + b"~")
    with open(path, "wb") as file:
        file.write(whole[:16] + struct.pack("<Q", n_keys + 2) + entry + rest + whole[header_size:])
for key, kind, value in json.load(sys.stdin):
    write(key.encode(), kind, bytes.fromhex(value))
    print(key, kind, value[:100], flush=True)
    print(tried(lambda: str(overspill.plan(overspill.ModelInfo.from_file(path), hardware=hardware))), flush=True)
    print(tried(generate), flush=True)
"""


def outcomes_of_keys(
    folder: Path, path: Path, header_size: int, cases: list[tuple[str, str]]
) -> dict[tuple[str, str], tuple[str, str]]:
    """Return what comes of planning and of loading a file with each key and value."""
    given = [(f"gpt-oss.{key}", VALUES[value][0], VALUES[value][1].hex()) for key, value in cases]
    file = folder / "model.gguf"
    command = [sys.executable, "-c", KEY_TRIAL, str(path), str(file), str(header_size)]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, timeout=600)
    found = done.stdout.replace(str(file), "FILE").splitlines()
    assert done.returncode == 0, f"died of {done.returncode} at {found[-3:]}: {done.stderr[-1500:]}"
    assert len(found) == 3 * len(cases)
    return dict(zip(cases, zip(found[1::3], found[2::3], strict=True), strict=True))


def test_figures_that_cannot_be(tmp_path: Path, tiny_gpt_oss_path: Path, header_size: int) -> None:
    """They are refused where a model is planned and where it is loaded, with the key, the value and the range."""
    expected = {
        ("rope.dimension_count", "zero"): "gpt-oss.rope.dimension_count is 0; it must be 1 to ",
        ("block_count", "2**32 - 1"): "gpt-oss.block_count is 4294967295; it must be 1 to 512",
        ("block_count", "negative"): "gpt-oss.block_count is -1; it must be 1 to 512",
        ("block_count", "zeros"): "gpt-oss.block_count is a arr; it must be an integer from 1 to 512",
        ("embedding_length", "text"): "gpt-oss.embedding_length is a str; it must be an integer from 1 to ",
        ("expert_used_count", "2**31 - 1"): "gpt-oss.expert_used_count is 2147483647; it must be 0 to 1024",
        ("expert_used_count", "large numbers"): "gpt-oss.expert_used_count is 4294967295; it must be 0 to 1024",
        ("attention.sliding_window", "2**32 - 1"): "gpt-oss.attention.sliding_window is 4294967295; it must be 0 to ",
        ("attention.head_count", "zero"): "gpt-oss.attention.head_count is 0 for layer 0, which has attn_q",
        ("attention.head_count_kv", "zeros"): "gpt-oss.attention.head_count_kv is 0 for layer 0, which has attn_k",
        ("expert_count", "zero"): "gpt-oss.expert_used_count is 4; it must be 0, like expert_count",
    }
    outcomes = outcomes_of_keys(tmp_path, tiny_gpt_oss_path, header_size, list(expected))
    for case, text in expected.items():
        for outcome in outcomes[case]:
            assert outcome.startswith(f"refused: FILE: is damaged: {text}"), (case, outcome)


@pytest.mark.slow
def test_every_key_of_the_header(tmp_path: Path, tiny_gpt_oss_path: Path, header_size: int) -> None:
    """Whatever is under llama.cpp's keys, a plan, a load and a step end with a result or an Error."""
    assert len(KEYS) > 100
    # Each key has the first values, and one of the others.
    first, others = list(VALUES)[:2], list(VALUES)[2:]
    cases = [(key, value) for n, key in enumerate(KEYS) for value in (*first, others[n % len(others)])]
    outcomes = outcomes_of_keys(tmp_path, tiny_gpt_oss_path, header_size, cases)
    assert sum(outcome[1] == "fine" for outcome in outcomes.values()) > 100
    for case, (planned, loaded) in outcomes.items():
        assert planned == "fine" or planned.startswith("refused: FILE: "), (case, planned)
        assert loaded == "fine" or loaded.startswith("refused: "), (case, loaded)


# Which types have a product, as the CPU backend says; then a model with a matrix of each.
TYPES_TRIAL = """
import ctypes, json, pathlib, sys
import overspill
class Traits(ctypes.Structure):
    _fields_ = [("from_float", ctypes.c_void_p), ("vec_dot", ctypes.c_void_p)]
(library,) = (pathlib.Path(overspill._core.__file__).parent / "lib").glob("*ggml-cpu.*")
traits = ctypes.CDLL(str(library)).ggml_get_type_traits_cpu
traits.restype = ctypes.POINTER(Traits)
for name, kind, path in json.load(sys.stdin):
    print(name, bool(traits(kind).contents.vec_dot), flush=True)
    try:
        with overspill.Model(path, offload="cpu", n_ctx=64, n_threads=1) as model:
            model.generate([1, 2, 3], max_tokens=2)
        print("fine", flush=True)
    except overspill.Error as error:
        print("refused:", error, flush=True)
"""


def test_types_of_weights(tmp_path: Path) -> None:
    """A matrix of a type that the CPU cannot multiply with is refused, and of every other type it is not."""
    if not list((Path(overspill._core.__file__).parent / "lib").glob("*ggml-cpu.*")):
        pytest.skip("the CPU backends are plugins here")
    cases = []
    for kind in gguf.GGMLQuantizationType:
        header = dense(
            "llama",
            n_layers=1,
            width=256,
            ffn_width=256,
            n_heads=2,
            n_heads_kv=2,
            n_vocab=256,
            n_ctx=64,
            rope_freq_base=1e4,
        )
        # Last, since some types have another size here than llama.cpp's.
        del header.tensors["output.weight"]
        header.tensors["output.weight"] = ((256, 256), kind)
        file = write_file(tmp_path / f"{kind.name}.gguf", header)
        cases.append((kind.name, int(kind), str(file)))
    command = [sys.executable, "-c", TYPES_TRIAL]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"died of {done.returncode} at {lines[-1:]}: {done.stderr[-1500:]}"
    has_product = dict(line.split() for line in lines[::2])
    assert {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"} <= {
        name for name in has_product if has_product[name] != "True"
    }
    assert len(has_product) == len(cases)
    for name, outcome in zip(has_product, lines[1::2], strict=True):
        if has_product[name] == "True":
            assert outcome == "fine", (name, outcome)
        else:
            assert "is damaged: the tensor output.weight is of type" in outcome, (name, outcome)


def test_a_vocabulary_alone(vocab_path: Path) -> None:
    """It cannot be loaded as a model; loaded as a vocabulary, it cannot generate; both are said."""
    refused(vocab_path, "holds a vocabulary and no weights")
    with (
        Model(vocab_path, vocab_only=True) as model,
        pytest.raises(overspill.Error, match="was loaded with vocab_only"),
    ):
        model.stream("Hello")


@pytest.mark.slow
def test_unknown_architecture(tmp_path: Path) -> None:
    """The architecture is named."""
    refused(
        write_tiny_gpt_oss(tmp_path / "model.gguf", architecture="gpt-next"), "unknown model architecture: 'gpt-next'"
    )


@pytest.mark.parametrize(
    "what", sweep(["blk.2.ffn_down_exps.weight", "output_norm", "block_count", "tokenizer.ggml.model"], always=[1, 2])
)
def test_something_is_missing(tmp_path: Path, what: str) -> None:
    """A tensor or a key without which there is no model is named."""
    refused(write_tiny_gpt_oss(tmp_path / "model.gguf", without=what), what)


def test_split_models(tmp_path: Path, tiny_gpt_oss: Model) -> None:
    """The first file loads all; a missing part, or a later one, is an error that says so."""
    first = write_tiny_gpt_oss(tmp_path / "model.gguf", n_files=3)
    with load(first) as model:
        assert greedy(model) == greedy(tiny_gpt_oss)
    refused(tmp_path / "model-00002-of-00003.gguf", "give the first one")
    (tmp_path / "model-00003-of-00003.gguf").rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(ModelLoadError, match=r"model-00003-of-00003\.gguf: no such file"):
        load(first)
    renamed = first.rename(tmp_path / "renamed.gguf")
    refused(renamed, "is not named like it")


def test_more_than_ram_holds(header_path: Callable[[str], Path], gemma_path: Path) -> None:
    """An error names the device and the need before anything is allocated; with a mapped file it depends on the KV."""
    cases: list[tuple[dict[str, Any], str]] = [
        ({"n_ctx": 2**31 - 1}, r"the KV cache of 2147483647 tokens would take 6144 GiB: give a smaller n_ctx"),
        ({"load_mode": "read", "n_ctx": 2**28}, r"the weights and the KV cache .*: give load_mode=\"mmap\", a smaller"),
    ]
    for options, text in cases:
        with pytest.raises(OutOfMemoryError, match=text) as caught:
            Model(gemma_path, offload="cpu", **options)
        assert caught.value.device == "CPU"
        assert caught.value.needed_bytes > 2**38
    path = header_path("gpt-oss-120b")
    if (available_ram_bytes() or 2**40) < 2**35:
        with pytest.raises(OutOfMemoryError, match="would take 59"):
            Model(path, offload="cpu", load_mode="read", n_ctx=512)


def test_repacked_weights_that_ram_cannot_hold(gemma_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapped file is used as it is then: the logits are those without repacking, bit by bit."""

    def logits(repack: Switch) -> NDArray[np.float32]:
        with Model(gemma_path, offload="cpu", n_ctx=256, n_threads=2, repack=repack) as model:
            return model.eval(model.tokenize(PROMPT)).copy()

    plain = logits("off")
    monkeypatch.setattr("overspill.engine.loading.available_ram_bytes", lambda: 200 << 20)
    assert np.array_equal(logits("auto"), plain)


@pytest.mark.parametrize("load_mode", get_args(LoadMode))
def test_load_modes(tiny_gpt_oss_path: Path, tiny_gpt_oss: Model, load_mode: LoadMode) -> None:
    """However the weights get into memory, they are the same."""
    with Model(tiny_gpt_oss_path, n_ctx=64, n_threads=2, load_mode=load_mode) as model:
        assert greedy(model) == greedy(tiny_gpt_oss)


def test_progress(tiny_gpt_oss_path: Path) -> None:
    """It grows from 0 to 1; False cancels; an exception reaches the caller; neither leaves anything behind."""
    shares: list[float] = []
    Model(tiny_gpt_oss_path, n_ctx=64, progress=shares.append).close()
    assert shares == sorted(shares)
    assert shares[0] >= 0
    assert shares[-1] == 1.0
    with pytest.raises(overspill.CancelledError, match="cancelled"):
        Model(tiny_gpt_oss_path, n_ctx=64, progress=lambda share: share < 0.5)
    with pytest.raises(ZeroDivisionError):
        Model(tiny_gpt_oss_path, n_ctx=64, progress=lambda share: bool(1 / 0))


def test_names_of_files(tmp_path: Path, whole: bytes) -> None:
    """Any name will do, bytes that are no text included; an error shows those as replaced."""
    names = [os.fsencode("模型 🙂.gguf")]
    if sys.platform == "linux":
        names.append(b"\xff\xfe.gguf")
    for name in names:
        file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        file.write_bytes(whole)
        with load(file) as model:
            assert len(greedy(model)) == 16
        file.write_bytes(whole[:5000])
        with pytest.raises(ModelLoadError, match=r"\.gguf: is damaged or truncated"):
            load(file)


def test_arguments(tiny_gpt_oss_path: Path) -> None:
    """A value out of range names its argument."""
    for options, text in (
        ({"n_ctx": 0}, "n_ctx must be at least 1"),
        ({"n_batch": 0}, "n_batch must be 1 to 65536"),
        ({"n_threads": 513}, "n_threads must be 1 to 512"),
        ({"offload": -1}, "offload must be"),
        ({"offload": "some"}, "offload must be"),
        ({"load_mode": "some"}, "load_mode must be one of mmap, read"),
    ):
        with pytest.raises(ValueError, match=text):
            Model(tiny_gpt_oss_path, **options)
    with pytest.raises(TypeError, match="progress must be callable"):
        Model(tiny_gpt_oss_path, progress=1)  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu(tiny_gpt_oss_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Asking for one is an error or a warning, never silence."""
    with pytest.raises(overspill.Error, match="there is no GPU here"):
        Model(tiny_gpt_oss_path, offload="gpu")
    Model(tiny_gpt_oss_path, n_ctx=64, offload=3).close()
    assert "offload=3 has no effect" in caplog.text


def test_the_log_of_llama_cpp(
    tiny_gpt_oss_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """It goes to the logger, and nothing is printed."""
    with caplog.at_level("DEBUG", logger="overspill.llama"):
        load(tiny_gpt_oss_path).close()
    assert any("gpt-oss" in record.message for record in caplog.records if record.name == "overspill.llama")
    assert capfd.readouterr() == ("", "")


HEADER_ONLY = """
import sys, os, json, logging
from overspill import Error, Model
path = sys.argv[1]
told = []
class Listen(logging.Handler):
    def emit(self, record):
        told.append(record.getMessage())
logging.getLogger("overspill").addHandler(Listen())
def interrupt(share):
    if share > float(sys.argv[2]):
        raise KeyboardInterrupt
try:
    with Model(path, offload="cpu", n_ctx=512, n_threads=1, progress=interrupt):
        ended = "loaded"
except KeyboardInterrupt:
    ended = "interrupted"
print(json.dumps([ended, told]), flush=True)
os._exit(0)
"""


def test_a_model_that_ram_has_no_room_for(gpt_oss_120b_header: Path) -> None:
    """It is said beforehand how much comes from the disk for a token, and loading it can be interrupted."""
    info = ModelInfo.from_file(gpt_oss_120b_header)
    available = available_ram_bytes()
    if available is None or available > info.file_bytes:
        pytest.skip("RAM has room for gpt-oss-120b")
    ended, told = in_process(HEADER_ONLY, str(gpt_oss_120b_header), "0.3")
    assert ended == "interrupted"
    (line,) = (line for line in told if line.startswith("RAM has room for"))
    room_gib, weights_gib = (float(n) for n in re.findall(r"([\d.]+) GiB of", line)[:2])
    assert 0 < room_gib < weights_gib
    assert weights_gib == pytest.approx(sum(n for *_, n in info.tensors) / 2**30, abs=0.06)
    assert "of the" in line
    assert "from the disk" in line


def test_a_mapped_file_is_read_with_progress(smollm2_path: Path) -> None:
    """The share goes up while pages are read, after llama.cpp's part; and each of its steps can end it."""
    if sys.platform != "linux" or available_ram_bytes() is None:
        pytest.skip("pages come when they are used here")
    shares: list[float] = []
    with Model(smollm2_path, n_ctx=64, progress=shares.append):
        pass
    assert shares == sorted(shares)
    # Pieces of 32 MiB.
    assert len({*shares}) >= smollm2_path.stat().st_size // (32 << 20)
    assert shares[-1] == 1.0
    for at_most in (0.0, 0.2, 0.5, 0.9):

        def interrupt(share: float, at_most: float = at_most) -> None:
            if share >= at_most:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Model(smollm2_path, n_ctx=64, progress=interrupt)
