"""GGUF files: changed keys, tensors, vocabularies and bytes. Each is planned, loaded, and asked for three tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Kind

import overspill
from fuzz.gguf_models import (
    BASES,
    Key,
    Model,
    Tensor,
    byte_vocabulary,
    key_of,
    piece_vocabulary,
    pre_tokenizers,
    word_vocabulary,
)
from fuzz.mutators import INTEGERS, NUMBERS, TEXTS, log_uniform, mutated_bytes, mutated_text, times
from overspill import Error, Hardware, ModelInfo

__all__ = ["GgufFiles", "check_message"]

_ARCHITECTURES = sorted(gguf.MODEL_ARCH_NAMES.values())
_KEY_FORMS = sorted(
    {
        value
        for group in vars(gguf.Keys).values()
        if isinstance(group, type)
        for value in vars(group).values()
        if isinstance(value, str) and "." in value
    }
)
_TENSOR_FORMS = sorted(name.format(bid=0) for name in gguf.TENSOR_NAMES.values())
_LARGEST_TENSOR = 1 << 24


def check_message(error: Exception, start: str = "") -> None:
    """Check that a message is one line that says something, and begins with what it is about."""
    assert str(error), "an error without a message"
    assert "\n" not in str(error), f"a message of several lines: {error}"
    assert str(error).startswith(start), f"a message about something else than {start}: {error}"


class GgufFiles:
    """See the module."""

    def __init__(self, folder: Path) -> None:
        """Keep files in ``folder``."""
        self._file = folder / "model.gguf"
        self._hardware = Hardware.given(vram="8GiB", ram="16GiB", n_threads=4)

    def make(self, random: Random) -> bytes:
        """Return the bytes of a changed model."""
        model = random.choice(list(BASES.values()))()
        if random.random() < 0.2:
            vocabulary = random.choice((byte_vocabulary, piece_vocabulary, word_vocabulary))()
            model = model.with_keys({name: key_of(name, value) for name, value in vocabulary.items()})
        how = random.random()
        if how < 0.9:
            changes = [_change_key, _change_key, _change_key, _change_vocabulary, _change_tensor, _change_tensor]

            def change() -> None:
                nonlocal model
                model = random.choice(changes)(random, model)

            times(random, change)
            if random.random() < 0.05:
                model = _change_frame(random, model)
        data = model.to_bytes()
        if how > 0.85:
            # Mostly in the header: the rest is weights.
            end = random.choice((64, 1000, 10_000, len(data)))
            data = mutated_bytes(random, data[:end]) + data[end:]
        return data

    def check(self, case: bytes) -> None:
        """Plan the file, load it, and ask for three tokens: these, or an Error."""
        self._file.write_bytes(case)
        try:
            info = ModelInfo.from_file(self._file)
            str(info)
        except Error as error:
            check_message(error)
        else:
            try:
                str(overspill.plan(info, hardware=self._hardware))
            except Error as error:
                check_message(error)
        try:
            with overspill.Model(self._file, offload="cpu", n_ctx=64, n_threads=1) as model:
                if model.has_chat_template:
                    for _ in model.chat("Hello", max_tokens=3):
                        pass
                completion = model.generate("Hello, 日本 world 12\n", max_tokens=3)
                assert completion.stats.tokens <= 3
        except Error as error:
            check_message(error)
        except ValueError as error:
            # A template may refuse a conversation, which is an argument.
            check_message(error, "messages: ")


def _change_key(random: Random, model: Model) -> Model:
    keys = list(model.keys)
    architecture = _architecture(model)
    # What converters write for vocabularies is long, and has its own changes.
    own = [i for i, key in enumerate(keys) if not key.name.startswith(b"tokenizer.ggml.")]
    at = random.choice(own if random.random() < 0.8 else range(len(keys))) if keys else 0
    key = keys[at] if keys else Key(b"a", Kind.UINT32, 1)
    match random.randrange(12):
        case 0 | 1 | 2 | 3 if not key.is_array:
            keys[at] = replace(key, value=_value(random, key))
        case 4:
            kind = random.choice([*Kind, 13, 255])
            keys[at] = Key(key.name, kind, [key.value] if kind == Kind.ARRAY else _value(random, key), Kind.UINT32)
        case 5:
            n = random.choice((0, 1, 2, 3, 512, 513, 5000))
            of = random.choice([kind for kind in Kind if kind != Kind.ARRAY])
            keys[at] = Key(key.name, Kind.ARRAY, [random.choice(NUMBERS)] * n, of)
        case 6:
            del keys[at : at + 1]
        case 7:
            keys.insert(at, replace(key, value=_value(random, key)) if not key.is_array else key)
        case 8:
            other = random.choice(keys) if random.random() < 0.5 else key
            keys[at] = replace(key, name=other.name if other is not key else mutated_bytes(random, key.name))
        case 9 | 10:
            form = random.choice(_KEY_FORMS)
            name = form.replace("{arch}", architecture.decode(errors="replace")).encode()
            value: Any = random.choice((random.choice(NUMBERS), random.choice(NUMBERS), random.choice(TEXTS)))
            kind = random.choice([kind for kind in Kind if kind != Kind.ARRAY])
            keys = [one for one in keys if one.name != name]
            keys.append(Key(name, kind, value if not isinstance(value, str) else value.encode()))
            if random.random() < 0.3:
                keys[-1] = Key(name, Kind.ARRAY, [random.choice(NUMBERS) for _ in range(log_uniform(random, 8))], kind)
        case _:
            return _as_architecture(random, model)
    return replace(model, keys=tuple(keys))


def _architecture(model: Model) -> bytes:
    said = [key.value for key in model.keys if key.name == b"general.architecture"]
    return said[0] if said and isinstance(said[0], bytes) else b"llama"


def _as_architecture(random: Random, model: Model) -> Model:
    """Return the model under another architecture's name, with its keys."""
    new = random.choice(_ARCHITECTURES).encode()
    old = _architecture(model)
    keys = [
        replace(key, value=new)
        if key.name == b"general.architecture"
        else replace(key, name=new + key.name[len(old) :] if key.name.startswith(old + b".") else key.name)
        for key in model.keys
    ]
    return replace(model, keys=tuple(keys))


def _value(random: Random, key: Key) -> Any:
    old = key.value
    if isinstance(old, bytes):
        if random.random() < 0.5:
            return mutated_text(random, old.decode(errors="replace")).encode()[:100_000]
        return random.choice((mutated_bytes(random, old), random.choice(TEXTS).encode(), b"none", b"yarn", b"longrope"))
    if isinstance(old, list):
        return old
    return random.choice((random.choice(NUMBERS), random.choice(INTEGERS), old + 1, old - 1, old * 2, old // 2, -old))


def _change_vocabulary(random: Random, model: Model) -> Model:
    keys = list(model.keys)
    own = [i for i, key in enumerate(keys) if key.name.startswith(b"tokenizer.")]
    if not own:
        return model
    at = random.choice(own)
    key = keys[at]
    if not key.is_array:
        named = {
            b"tokenizer.ggml.model": (
                b"llama",
                b"gpt2",
                b"bert",
                b"t5",
                b"rwkv",
                b"plamo2",
                b"gemma4",
                b"none",
                b"test",
            ),
            b"tokenizer.ggml.pre": [name.encode() for name in pre_tokenizers()],
        }
        if key.name in named and random.random() < 0.7:
            keys[at] = replace(key, value=random.choice(named[key.name]))
        else:
            keys[at] = replace(key, value=_value(random, key))
        return replace(model, keys=tuple(keys))
    elements = list(key.value)
    is_text = key.of == Kind.STRING

    def element() -> Any:
        if not is_text:
            return random.choice(NUMBERS)
        old = random.choice(elements) if elements else b"a"
        return random.choice(
            (
                old,
                random.choice(TEXTS).encode(),
                mutated_bytes(random, old)[:1000],
                old + b" " + old,
                b"<0x41>",
                b"\xff\xfe",
                b"\xe6\x97",
                random.choice(TEXTS).encode() * log_uniform(random, 500),
            )
        )

    def change() -> None:
        place = random.randrange(len(elements) + 1)
        n = log_uniform(random, max(1, len(elements)))
        match random.randrange(6):
            case 0 | 1 if place < len(elements):
                elements[place] = element()
            case 2:
                elements.insert(place, element())
            case 3:
                del elements[place : place + n]
            case 4:
                elements[place:place] = elements[place : place + n]
            case _:
                elements[place : place + n] = [element()] * n

    times(random, change)
    keys[at] = replace(key, value=elements)
    return replace(model, keys=tuple(keys))


def _n_bytes(dims: tuple[int, ...], kind: int) -> int | None:
    """Return the size of a tensor; None if there is none, or it is too much."""
    if kind not in gguf.GGML_QUANT_SIZES or any(n < 0 or n > _LARGEST_TENSOR for n in dims):
        return None
    block, size = gguf.GGML_QUANT_SIZES[Type(kind)]
    n = int(np.prod(dims, dtype=np.float64))
    return n // block * size if n <= _LARGEST_TENSOR else None


def _fitted(random: Random, tensor: Tensor) -> Tensor:
    """Return the tensor with as much data as it should have, mostly."""
    n = _n_bytes(tensor.dims, tensor.kind)
    if n is None or random.random() < 0.1:
        return tensor
    data = (tensor.data * (n // max(1, len(tensor.data)) + 1))[:n] if tensor.data else bytes(n)
    return replace(tensor, data=data)


def _change_tensor(random: Random, model: Model) -> Model:
    tensors = list(model.tensors)
    if not tensors:
        return model
    at = random.randrange(len(tensors))
    tensor = tensors[at]
    dims = list(tensor.dims)
    match random.randrange(10):
        case 0 | 1:
            kind = random.choice([*Type, 4, 5, 42, 1000, 2**31])
            # All of a kind, as a converter that is wrong would do.
            alike = [i for i, one in enumerate(tensors) if one.name.split(b".")[-2:] == tensor.name.split(b".")[-2:]]
            for i in alike if random.random() < 0.5 else [at]:
                tensors[i] = _fitted(random, replace(tensors[i], kind=int(kind)))
        case 2 | 3:
            place = random.randrange(len(dims)) if dims else 0
            if dims:
                n = dims[place]
                dims[place] = random.choice((n + 1, n - 1, n * 2, n // 2, n + 32, n - 32, random.choice(INTEGERS)))
            tensors[at] = _fitted(random, replace(tensor, dims=tuple(dims)))
        case 4:
            dims = random.choice((dims[::-1], [*dims, 1], [*dims, 2], dims[1:], [*dims] * 3, [1, *dims], []))
            tensors[at] = _fitted(random, replace(tensor, dims=tuple(dims)))
        case 5:
            del tensors[at]
        case 6:
            tensors.insert(random.randrange(len(tensors)), tensor)
        case 7:
            name = random.choice((random.choice(tensors).name, mutated_bytes(random, tensor.name)))
            tensors[at] = replace(tensor, name=name[:2000])
        case 8:
            name = random.choice(_TENSOR_FORMS).encode() + random.choice((b".weight", b".bias", b""))
            tensors.append(replace(tensor, name=name))
        case _:
            if random.random() < 0.5:
                tensors[at] = replace(tensor, offset=random.choice((*INTEGERS, 32, len(tensor.data))))
            else:
                tensors[at] = replace(tensor, data=mutated_bytes(random, tensor.data)[: len(tensor.data) + 1000])
    return replace(model, tensors=tuple(tensors))


def _change_frame(random: Random, model: Model) -> Model:
    match random.randrange(4):
        case 0:
            return replace(model, n_keys=random.choice((len(model.keys) + 1, len(model.keys) - 1, *INTEGERS)))
        case 1:
            return replace(model, n_tensors=random.choice((len(model.tensors) + 1, len(model.tensors) - 1, *INTEGERS)))
        case 2:
            return replace(model, version=random.choice((0, 1, 2, 4, 0x03000000, 2**32 - 1)))
        case _:
            alignment = random.choice((1, 2, 8, 16, 64, 4096))
            return replace(
                model.with_keys({"general.alignment": key_of("general.alignment", alignment)}), alignment=alignment
            )
