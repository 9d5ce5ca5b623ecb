"""Saved chats, placements, hardware and tuned settings, changed."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

import overspill
from fuzz.gguf_models import qwen3_moe
from fuzz.mutators import mutated_bytes, mutated_json_text
from fuzz.targets.gguf_files import check_message
from fuzz.targets.languages import small_model
from overspill import Chat, Error, Hardware, ModelInfo, Placement
from overspill.engine.conversation import _checksum
from overspill.engine.session import _checksum as _checksum_of
from overspill.engine.session import _digest

__all__ = ["Chats", "HardwareFiles", "Placements", "States", "TunedFiles"]


class Chats:
    """Saved conversations, most of them with the checksum that goes with the change."""

    def __init__(self, folder: Path) -> None:
        """Save a conversation."""
        self._model = small_model(folder)
        self._model.chat_template = overspill.ChatTemplate(
            self._model, "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        )
        self._file = folder / "chat.json"
        chat = Chat(self._model, system="Be brief.")
        chat.messages += [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi", "reasoning_content": "They say hello."},
            {"role": "user", "content": [{"type": "text", "text": "And?"}]},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "name": "f", "content": "3"},
        ]
        chat.save(self._file)
        self._saved = json.loads(self._file.read_text(encoding="utf-8"))

    def make(self, random: Random) -> bytes:
        """Return the bytes of a changed file."""
        names = (
            "role",
            "content",
            "format",
            "model",
            "messages",
            "sha256",
            "name",
            "header",
            "tool_calls",
            "type",
            "text",
        )
        text = mutated_json_text(random, self._saved, names)
        if random.random() < 0.8:
            try:
                data = json.loads(text)
                data.pop("sha256", None)
                text = json.dumps({**data, "sha256": _checksum(data)})
            except (ValueError, TypeError, AttributeError, RecursionError):
                pass
        data = text.encode("utf-8", "surrogatepass")
        return mutated_bytes(random, data) if random.random() < 0.1 else data

    def check(self, case: bytes) -> None:
        """Load the conversation, and go on with it."""
        self._file.write_bytes(case)
        try:
            chat = Chat.load(self._file, self._model)
        except Error as error:
            check_message(error)
            return
        _ = chat.system
        chat.branch().undo()
        try:
            for _token in chat.send("And now?", max_tokens=2):
                pass
            chat.save(self._file)
        except (Error, ValueError, TypeError) as error:
            check_message(error)


class Placements:
    """Saved placements, with the model that they are for and without."""

    def __init__(self, folder: Path) -> None:
        """Save a placement."""
        model = folder / "model.gguf"
        model.write_bytes(qwen3_moe().to_bytes())
        self._info = ModelInfo.from_file(model)
        self._file = folder / "placement.json"
        placement = Placement(self._info, ["CUDA0", "CUDA1"], default="CUDA0")
        placement.assign(part="experts", device="CPU")
        placement.override(r"blk\.1\.attn_q", "CUDA1")
        placement.kv_bytes_by_layer = [100, 200]
        self._saved = placement.to_dict()

    def make(self, random: Random) -> bytes:
        """Return the bytes of a changed file."""
        names = (
            *(
                "model",
                "devices",
                "layers",
                "output",
                "embedding",
                "overrides",
                "attention",
                "experts",
                "kv",
                "tensor_bytes",
            ),
            *(
                "n_layers",
                "kv_bytes_by_layer",
                "0-1",
                "0-4095",
                "1-0",
                "-1",
                "CPU",
                "cpu",
                "CUDA0",
                "blk.0-1.attn_q.weight",
            ),
            *("(a+)+$", "(", "gpu", "architecture", "name"),
        )
        data = mutated_json_text(random, self._saved, names).encode("utf-8", "surrogatepass")
        return mutated_bytes(random, data) if random.random() < 0.1 else data

    def check(self, case: bytes) -> None:
        """Load the placement, and use it in every way."""
        self._file.write_bytes(case)
        for info in (None, self._info):
            try:
                placement = Placement.load(self._file, info)
            except (Error, ValueError) as error:
                check_message(error)
                continue
            str(placement)
            placement._repr_html_()
            _ = (placement.fingerprint, placement.bytes_by_device(), placement.tensors, placement.devices_used)
            json.dumps(placement.to_dict())
            try:
                _ = placement.llama_arguments()
                placement.server_flags()
            except (Error, ValueError) as error:
                check_message(error)


class States:
    """Saved states, half of them with checksums that go with the change, as only a forger makes them."""

    def __init__(self, folder: Path) -> None:
        """Save a state."""
        self._model = small_model(folder)
        self._file = folder / "state"
        self._model.generate([1, 2, 3, 4, 5], max_tokens=6, session=self._file)
        self._saved = self._file.read_bytes()
        (n,) = struct.unpack_from("<I", self._saved, 20)
        self._parts = self._saved[:24], self._saved[24 : 24 + n], self._saved[24 + n + 32 : -32]

    def make(self, random: Random) -> bytes:
        """Return the bytes of a changed file."""
        if random.random() < 0.5:
            return mutated_bytes(random, self._saved)
        begin, header, rest = self._parts
        if random.random() < 0.3:
            changed: dict[str, Any] = json.loads(header)
            form = changed["state"]
            name = random.choice([*form])
            form[name] = random.choice([0, 1, 2, -1, 3, 2**31, 2**64, None, "a", 1.5, form[name] * 2])
            header = json.dumps(changed).encode()
            begin = begin[:20] + struct.pack("<I", len(header))
        else:
            rest = mutated_bytes(random, rest)
            changed = json.loads(header)
            form = changed["state"]
            form["state_bytes"] = len(rest) - 4 * form["n_tokens"] - form["remembered_bytes"]
            header = json.dumps(changed).encode()
            begin = begin[:20] + struct.pack("<I", len(header))
        return begin + header + _digest(begin + header) + rest + _checksum_of([np.frombuffer(rest, np.uint8)])

    def check(self, case: bytes) -> None:
        """Load the state, and go on from it."""
        self._file.write_bytes(case)
        try:
            self._model.load_state(self._file)
        except Error as error:
            check_message(error)
        self._model.generate([1, 2, 3, 4, 5, 6], max_tokens=2, reuse=True)


class HardwareFiles:
    """Saved hardware, which a plan is then made for."""

    def __init__(self, folder: Path) -> None:
        """Save hardware."""
        model = folder / "model.gguf"
        model.write_bytes(qwen3_moe().to_bytes())
        self._info = ModelInfo.from_file(model)
        self._saved = Hardware.given(vram=["24GiB", "8GiB"], ram="64GiB", gpu_bandwidth=[936e9, 400e9]).to_dict()

    def make(self, random: Random) -> str:
        """Return the JSON of changed hardware."""
        names = (*self._saved, *self._saved["devices"][0], "cpu", "gpu", "CPU", "GPU0", "q8_0", "f16:kv", "measured")
        return mutated_json_text(random, self._saved, names)

    def check(self, case: str) -> None:
        """Read it, and plan."""
        try:
            data: Any = json.loads(case)
        except (ValueError, RecursionError):
            return
        try:
            hardware = Hardware.from_dict(data)
        except (Error, ValueError) as error:
            check_message(error)
            return
        str(hardware)
        hash(hardware)
        json.dumps(hardware.to_dict(), allow_nan=False)
        try:
            planned = overspill.plan(self._info, hardware=hardware)
            str(planned)
            str(planned.forecast())
        except (Error, ValueError) as error:
            check_message(error)


class TunedFiles:
    """What tuning keeps: a file that is no use counts as not there."""

    def __init__(self, folder: Path) -> None:
        """Keep settings in ``folder``."""
        import os

        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        from overspill.planning import tuned

        self._tuned = tuned
        self._model = folder / "model.gguf"
        self._model.write_bytes(qwen3_moe().to_bytes())
        self._info = ModelInfo.from_file(self._model)
        settings = {
            **{
                "n_ctx": 128,
                "n_ubatch": 64,
                "n_threads": 1,
                "type_k": "f16",
                "type_v": "f16",
                "flash_attention": "auto",
            },
            **{"repack": "off", "kernels": "auto", "load_mode": "mmap", "offload_min_batch": 32},
        }
        self._file = tuned.save_tuned(self._info, Placement.cpu(self._info), settings, 12.5)
        self._saved = json.loads(self._file.read_text(encoding="utf-8"))

    def make(self, random: Random) -> bytes:
        """Return the bytes of a changed file."""
        names = (*self._saved, *self._saved["settings"], *self._saved["placement"], "auto", "on", "CPU", "f16", "q8_0")
        data = mutated_json_text(random, self._saved, names).encode("utf-8", "surrogatepass")
        return mutated_bytes(random, data) if random.random() < 0.1 else data

    def check(self, case: bytes) -> None:
        """Ask for the tuned settings, and load the model with them."""
        self._file.write_bytes(case)
        float(self._tuned.tuned_speed(self._info))
        try:
            with overspill.Model(self._model, offload="tuned") as model:
                model.generate([1, 2], max_tokens=1)
        except (Error, ValueError, TypeError) as error:
            check_message(error)
