"""Saved states: what a KV cache has of prompt and reply, in a file."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overspill._core import LLAMA_CPP_COMMIT, ContextFullError, Error, Model, SequenceState
from overspill.base.cached import cached_property
from overspill.base.checks import as_flag, as_integer, as_path, shown
from overspill.base.files import open_regular, replacing
from overspill.base.host import available_ram_bytes
from overspill.base.units import format_bytes
from overspill.base.values import CacheType
from overspill.header.info import ModelInfo

__all__ = ["SavedStates", "Session", "identity"]

_MAGIC = b"OVERSPILL STATE\n"
_FORMAT = 1
_HEAD = struct.Struct("<16sII")  # mark, format, bytes of the header, which is JSON
_MOST_HEADER_BYTES = 1 << 16
_DIGEST_BYTES = 32
_BLOCK_BYTES = 16 << 20  # which a thread hashes
_N_SAMPLES, _SAMPLE_BYTES = 32, 4096  # of the weights

_Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class _Form:
    """The parts of a state, as :class:`SequenceState` has them."""

    n_tokens: int
    state_bytes: int
    remembered_bytes: int
    n_remembered: int
    n_streams: int
    is_long: bool

    @classmethod
    def checked(cls, data: dict[str, Any]) -> _Form:
        """Return what a file says, or raise what names the wrong part."""
        counts = {one.name: as_integer(one.name, data[one.name], 0, 2**50) for one in fields(cls)[:-1]}
        return cls(**counts, is_long=as_flag("is_long", data["is_long"]))

    @property
    def n_bytes(self) -> int:
        """Bytes of tokens and both states."""
        return 4 * self.n_tokens + self.state_bytes + self.remembered_bytes


def identity(info: ModelInfo) -> dict[str, str]:
    """Return a model's name, and a hash of what its header says."""
    header = repr((info.architecture, info.name, sorted(info.tensors), sorted(info.metadata.items(), key=repr)))
    return {"name": info.name or Path(info.files[0]).name, "header": hashlib.sha256(header.encode()).hexdigest()}


class SavedStates:
    """The states of one loaded model in files.

    A file has a head, which says what it fits; then the tokens, llama.cpp's state, and the state that is remembered for
    windows and recurrent layers. Head and rest each have a checksum: llama.cpp reads nothing that was not written here.
    """

    def __init__(self, native: Model, info: ModelInfo, type_k: CacheType, type_v: CacheType) -> None:
        """Take a loaded model, its header and the types of its KV cache."""
        self._native, self._info = native, info
        self._types = {"type_k": type_k, "type_v": type_v}

    @cached_property
    def _model(self) -> dict[str, str]:
        # Headers of models that were trained further are often the same.
        return {**identity(self._info), "weights": _weights_sample(self._info)}

    def write(self, file: Path, state: SequenceState) -> None:
        """Replace a file as a whole; an Error if it cannot be written, and then the old one stays."""
        parts = [part.view(np.uint8) for part in state.parts()]
        sizes = parts[0].size // 4, parts[1].size, parts[2].size
        form = _Form(*sizes, state.n_remembered, state.n_streams, state.is_long)
        header = {"llama_cpp": LLAMA_CPP_COMMIT, "model": self._model, **self._types, "state": asdict(form)}
        text = json.dumps(header).encode()
        head = _HEAD.pack(_MAGIC, _FORMAT, len(text)) + text
        checksum = _checksum(parts)
        try:
            with replacing(file) as draft:
                draft.write(head + _digest(head))
                for block in _blocks(parts):
                    draft.write(block.data)
                draft.write(checksum)
        except OSError as error:
            raise Error(f"{file}: cannot be written: {error.strerror or error}") from None

    def read(self, file: Path) -> SequenceState:
        """Return the state in a file; an Error that says why it cannot be used here."""
        try:
            with open_regular(file) as source:
                header = _read_header(file, source)
                self._check_that_it_fits(file, header)
                return self._read_state(file, source, _Form.checked(header["state"]))
        except OSError as error:
            raise Error(f"{file}: {error.strerror or error}") from None
        except (KeyError, TypeError, ValueError) as error:  # its checksum says otherwise
            raise Error(f"{file}: is damaged: {shown(error)}") from None

    def _check_that_it_fits(self, file: Path, header: dict[str, Any]) -> None:
        if header["llama_cpp"] != LLAMA_CPP_COMMIT:
            raise Error(
                f"{file}: was saved with another version of llama.cpp, {shown(header['llama_cpp'])}, and this is "
                f"{LLAMA_CPP_COMMIT}. Delete it, or give another file"
            )
        if header["model"] != self._model:
            name = shown(header["model"]["name"])
            raise Error(f"{file}: was saved with another model, {name}. Load that one, or give another file")
        for name, kind in self._types.items():
            if header[name] != kind:
                raise Error(
                    f'{file}: was saved with {name}="{header[name]}", and the model is loaded with {name}="{kind}". '
                    "Load it with the former, or give another file"
                )

    def _read_state(self, file: Path, source: io.FileIO, form: _Form) -> SequenceState:
        left = os.fstat(source.fileno()).st_size - source.tell() - _DIGEST_BYTES
        if left != form.n_bytes:
            raise Error(f"{file}: is damaged: it has {left} bytes of state, not {form.n_bytes}")
        if form.n_tokens > self._native.n_ctx:
            raise ContextFullError(
                f"{file}: has {form.n_tokens} tokens, and the context holds {self._native.n_ctx}: load the model with "
                "a larger n_ctx, or give another file"
            )
        available = available_ram_bytes()
        if available is not None and left > available:
            raise Error(f"{file}: takes {format_bytes(left)} of RAM, of which {format_bytes(available)} are free")
        state = SequenceState(*astuple(form))
        parts = [part.view(np.uint8) for part in state.parts()]
        for block in _blocks(parts):
            _fill(source, block)
        if source.read(_DIGEST_BYTES) != _checksum(parts):
            raise Error(f"{file}: is damaged: its checksum is wrong. Delete it, or give another file")
        return state


class Session:
    """The file that a stream begins with and is saved to; it stands for its path wherever one is taken."""

    def __init__(self, path: object, states: SavedStates) -> None:
        """Read the file, if there is one; an Error if it cannot be used, or no file can be written there."""
        self._file, self._states = as_path("session", path), states
        folder = self._file.absolute().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise Error(f"{self._file}: cannot be written: its folder is missing, or not yours to write to")
        self.state = states.read(self._file) if os.path.lexists(self._file) else None
        """What the file had; None without a file."""

    def __fspath__(self) -> str:
        """Return the path."""
        return os.fspath(self._file)

    def keep(self, state: SequenceState) -> None:
        """Write a state to the file; an Error if that fails, and then the old one stays."""
        self._states.write(self._file, state)


def _read_header(file: Path, source: io.FileIO) -> dict[str, Any]:
    head = source.read(_HEAD.size)
    if len(head) < _HEAD.size or not head.startswith(_MAGIC):
        raise Error(f"{file}: is damaged, or no saved state: give another file")
    _, version, n_bytes = _HEAD.unpack(head)
    rest = source.read(min(n_bytes, _MOST_HEADER_BYTES) + _DIGEST_BYTES)
    text, digest = rest[:-_DIGEST_BYTES], rest[-_DIGEST_BYTES:]
    if digest != _digest(head + text):
        raise Error(f"{file}: is damaged: the checksum of its head is wrong. Delete it, or give another file")
    if version != _FORMAT:
        raise Error(f"{file}: was saved by another version of overspill. Delete it, or give another file")
    header: dict[str, Any] = json.loads(text)
    return header


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


def _blocks(parts: Sequence[_Bytes]) -> Iterator[_Bytes]:
    for part in parts:
        for at in range(0, part.size, _BLOCK_BYTES):
            yield part[at : at + _BLOCK_BYTES]


def _checksum(parts: Sequence[_Bytes]) -> bytes:
    """Return the hash of the hashes of blocks, which threads compute at the same time."""
    with ThreadPoolExecutor(4) as threads:
        return _digest(b"".join(threads.map(lambda block: _digest(block.data), _blocks(parts))))


def _fill(source: io.FileIO, block: _Bytes) -> None:
    view = block.data
    while view:
        n = source.readinto(view)
        if not n:
            return  # it has become shorter; the checksum says so
        view = view[n:]


def _weights_sample(info: ModelInfo) -> str:
    """Return a hash of some bytes from everywhere in a model's files."""
    sizes = [Path(file).stat().st_size for file in info.files]
    hashed = hashlib.blake2b(repr(sizes).encode(), digest_size=_DIGEST_BYTES)
    for name, size in zip(info.files, sizes, strict=True):
        with Path(name).open("rb") as file:
            for i in range(1, _N_SAMPLES + 1):
                file.seek(max(0, size * i // _N_SAMPLES - _SAMPLE_BYTES))
                hashed.update(file.read(_SAMPLE_BYTES))
    return hashed.hexdigest()
