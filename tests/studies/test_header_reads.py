"""Each file's header is read once, however many plans, loads and trials it is for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import overspill
from overspill import Cascade, Model, ModelInfo, _core


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Return a list that grows with each header that is read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    read_gguf, paths = _core.read_gguf, list[str]()

    def counted(path: bytes) -> _core.GgufFile:
        paths.append(os.fsdecode(path))
        return read_gguf(path)

    monkeypatch.setattr("overspill.header.info.read_gguf", counted)
    return paths


def test_a_model_takes_a_header_for_its_file(tiny_gpt_oss_path: Path, reads: list[str]) -> None:
    """It is loaded from the header's file, and has that header as it is."""
    info = ModelInfo.from_file(tiny_gpt_oss_path)
    assert os.fspath(info) == str(tiny_gpt_oss_path)
    with Model(info, n_ctx=64, n_threads=1) as model:
        assert model.info is info
        assert model.path == tiny_gpt_oss_path
    assert reads == [str(tiny_gpt_oss_path)]


def test_studies(tiny_gpt_oss_path: Path, reads: list[str]) -> None:
    """A comparison of a file with itself, a benchmark, and the trials of a search."""
    path = str(tiny_gpt_oss_path)
    compared = overspill.compare([path, path], ["a", "b"], n_ctx=64, n_threads=1, max_tokens=2, memory={"cpu": "1GiB"})
    assert all(answer.stats is not None for one in compared.models for answer in one.answers)
    assert reads == [path]
    overspill.bench(path, n_prompt=0, n_gen=4, repetitions=1, n_threads=1)
    assert reads == [path] * 2
    assert len(overspill.tune(path, n_ctx=64, seconds=0.2).trials) >= 1
    assert reads == [path] * 3


@pytest.mark.parametrize("room", [None, "1MiB"])
def test_a_cascade(tiny_gpt_oss_path: Path, tmp_path: Path, reads: list[str], room: str | None) -> None:
    """With both models in memory, and with one at a time, which is loaded again for each question."""
    large_path = tmp_path / "large.gguf"
    large_path.symlink_to(tiny_gpt_oss_path)
    memory = None if room is None else {"cpu": room}
    with Cascade(tiny_gpt_oss_path, large_path, lambda draft: True, memory=memory, n_ctx=64, n_threads=1) as cascade:
        assert cascade.keeps_both == (room is None)
        for _ in range(2):
            with cascade.stream("x", max_tokens=2) as reply:
                assert list(reply)
            assert reply.stats.answered_by == "large"
    assert reads == [str(tiny_gpt_oss_path), str(large_path)]
