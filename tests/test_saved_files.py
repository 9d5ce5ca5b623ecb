"""Saved files that are damaged: a chat, a placement, what was tuned and what was measured."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from damaged_json import damaged
from overspill import Chat, ChatTemplate, Error, Hardware, Model, ModelInfo, Placement
from overspill.engine.conversation import _checksum
from overspill.engine.load_settings import checked_settings
from overspill.planning import tuned
from overspill.planning.tuned import load_tuned, save_tuned, tuned_options, tuned_speed

QUICK, ALL = range(40), range(3000)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
SETTINGS: dict[str, Any] = {
    **{"n_ctx": 64, "n_ubatch": 64, "n_threads": 1, "type_k": "f16", "type_v": "f16"},
    **{"flash_attention": "auto", "repack": "auto", "kernels": "auto", "load_mode": "mmap", "offload_min_batch": 32},
}

Read = Callable[[Path], object]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder, which is the user's cache folder meanwhile."""
    path = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(path))
        # What is measured here is to be kept, whatever else this machine is doing.
        patch.setattr("overspill.machine.measure._MOST_INTERRUPTIONS_PER_S", math.inf)
        yield path


@pytest.fixture(scope="module")
def kinds(tiny_gpt_oss_path: Path, folder: Path) -> Iterator[dict[str, tuple[Path, Any, Callable[[Any], Any], Read]]]:
    """Return of each kind of file its place, its content, what makes damage look whole, and what reads and uses it."""
    info = ModelInfo.from_file(tiny_gpt_oss_path)
    placement = Placement(info, ["CUDA0"])
    placement.assign(part="experts", device="gpu")
    placement.override("ffn_gate", "gpu")
    placement.kv_bytes_by_layer = [1024] * info.n_layers
    hardware = Hardware.given(ram="8GiB", vram="1GiB")

    def read_placement(file: Path) -> object:
        loaded = Placement.load(file)
        str(loaded), loaded.bytes_by_device(), loaded.fingerprint
        assert Placement.from_dict(json.loads(json.dumps(loaded.to_dict()))) == loaded
        return loaded.llama_arguments()

    def read_hardware(file: Path) -> object:
        try:
            data = json.loads(file.read_bytes())
        except RecursionError as error:  # the caller's
            raise ValueError(str(error)) from None
        loaded = Hardware.from_dict(data)
        assert str(loaded)
        return Placement.from_layers(info, loaded, 2).devices

    def read_tuned(file: Path) -> object:
        found = load_tuned(info)
        assert found is not None or tuned_speed(info) == 0
        options = tuned_options(info)
        options.pop("offload").llama_arguments()
        return checked_settings(**SETTINGS_BESIDE, **options)

    def read_measured(file: Path) -> object:
        return str(Hardware.here(info, measure=False))

    kept = save_tuned(info, placement, SETTINGS, 1.0)
    Hardware.here(None, n_threads=1)
    measured = folder / "overspill" / "hardware.json"
    with Model(tiny_gpt_oss_path, n_ctx=64, n_threads=1, offload="cpu") as model:
        model.chat_template = ChatTemplate(model, TEMPLATE)
        chat = Chat(model, system="Be short.")
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        chat.messages += [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "name": "f", "content": "3"},
            {"role": "assistant", "content": "Three", "reasoning_content": "Hm."},
            {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
        ]
        chat.save(folder / "chat.json")

        def read_chat(file: Path) -> object:
            loaded = Chat.load(file, model)
            loaded.save(folder / "again.json")
            assert Chat.load(folder / "again.json", model).messages == loaded.messages
            assert loaded.system is None or isinstance(loaded.system, str | list)
            try:
                model.chat_template.render(loaded.messages or "Hello")
            except TypeError as error:
                raise ValueError(str(error)) from error  # a message that was saved and cannot be sent
            return loaded.undo()

        def with_checksum(data: Any) -> Any:
            return {**data, "sha256": _checksum(data)} if isinstance(data, dict) else data

        def as_it_is(data: Any) -> Any:
            return data

        chat_data = json.loads((folder / "chat.json").read_bytes())
        del chat_data["sha256"]
        yield {
            "chat": (folder / "damaged chat.json", chat_data, with_checksum, read_chat),
            "placement": (folder / "placement.json", placement.to_dict(), as_it_is, read_placement),
            "hardware": (folder / "given.json", hardware.to_dict(), as_it_is, read_hardware),
            "tuned": (kept, json.loads(kept.read_bytes()), as_it_is, read_tuned),
            "measured": (measured, json.loads(measured.read_bytes()), as_it_is, read_measured),
        }


# What a load needs besides the settings that are tuned.
SETTINGS_BESIDE: dict[str, Any] = {
    **{
        "n_batch": None,
        "n_parallel": None,
        "prompt_cache": 0,
        "max_pause_s": 0.5,
        "adapt_threads": True,
        "vocab_only": False,
        "check_tensors": False,
        "pin_weights": "auto",
    },
    **{"prompt_tokens": 1, "reply_tokens": 1},
    **{"experts": "auto", "expert_cache": None, "expert_insertions": None},
}
assert set(SETTINGS) == set(tuned.SETTINGS)
NAMES = ("chat", "placement", "hardware", "tuned", "measured")


def outcome(read: Read, file: Path) -> str:
    """Return what is wrong with how a file is read; nothing if it is read, or refused in a line."""
    try:
        read(file)
    except (Error, ValueError) as error:
        return f"two lines: {error}" if "\n" in str(error) else ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def sweep_over(kind: tuple[Path, Any, Callable[[Any], Any], Read], seeds: range) -> None:
    """Read files with damage of each seed."""
    file, data, finish, read = kind
    file.write_text(json.dumps(finish(data)), encoding="utf-8")
    read(file)  # what is whole is read
    found = []
    for seed in seeds:
        file.write_bytes(damaged(data, seed, finish))
        if what := outcome(read, file):
            found.append(f"seed {seed}: {what}")
    assert not found, f"{len(found)} of {len(seeds)}:\n" + "\n".join(found[:20])


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_refused(kinds: dict[str, Any], name: str) -> None:
    """With an error of the library, or a ValueError, in one line."""
    sweep_over(kinds[name], QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_any_damaged_file_is_refused(kinds: dict[str, Any], name: str) -> None:
    """In three thousand ways."""
    sweep_over(kinds[name], ALL)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in folders")
def test_what_is_no_file_is_refused(kinds: dict[str, Any], name: str) -> None:
    """A folder, a pipe that nobody writes to, and a file that is not there."""
    file, _, _, read = kinds[name]
    if name == "hardware":
        return  # read from what the caller has read
    for make, remove in (
        (lambda: None, lambda: None),
        (file.mkdir, file.rmdir),
        (lambda: os.mkfifo(file), file.unlink),
    ):
        file.unlink(missing_ok=True)
        make()
        assert not outcome(read, file)
        if name in ("chat", "placement"):
            with pytest.raises(Error, match=file.name):
                read(file)
        remove()
