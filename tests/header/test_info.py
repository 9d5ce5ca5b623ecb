"""What a header says, against what was written into it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from commands import overspill
from model_files import (
    EXPERT_WIDTH,
    EXPERTS,
    EXPERTS_USED,
    LAYERS,
    VOCABULARY,
    WIDTH,
    write_tiny_gpt_oss,
)
from overspill import Model, ModelInfo, SamplingOptions
from sweeps import sweep


@pytest.fixture(scope="module")
def info(tiny_gpt_oss_path: Path) -> ModelInfo:
    """Return the header of the tiny gpt-oss."""
    return ModelInfo.from_file(tiny_gpt_oss_path)


def test_figures(info: ModelInfo) -> None:
    """They are the ones that were written."""
    assert info.architecture == "gpt-oss"
    assert (info.n_layers, info.n_experts, info.n_experts_used) == (LAYERS, EXPERTS, EXPERTS_USED)
    assert (info.n_embd, info.n_vocab, info.n_ctx_train) == (WIDTH, VOCABULARY, 131072)
    assert "MXFP4" in info.quantisation
    assert "4 layers, 8 experts (4 used)" in str(info)


def test_bytes_by_part(info: ModelInfo) -> None:
    """An MXFP4 block has 17 bytes for 32 weights, Q8_0 34, F32 4 for one."""
    experts = 3 * EXPERTS * (EXPERT_WIDTH * WIDTH * 17 // 32 + EXPERT_WIDTH * 4)
    assert info.layers[0]["experts"] == experts
    assert info.bytes_by_part["experts"] == LAYERS * experts
    assert info.layers[0]["dense"] == 4 * (EXPERTS * WIDTH + EXPERTS)
    matrix = VOCABULARY * WIDTH * 34 // 32
    assert info.bytes_by_part["embedding"] == matrix
    assert info.bytes_by_part["output"] == matrix + 4 * WIDTH
    assert info.bytes_by_part["other"] == 0
    assert not info.tied_embedding
    parts = info.bytes_by_part
    assert info.bytes_per_token == parts["attention"] + parts["dense"] + parts["experts"] // 2 + parts["output"] + (
        matrix // VOCABULARY
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "quantisation", "n_tokens"),
    sweep([("smollm2", "Q4_1", 49152), ("gemma", "Q4_K_M", 262144)], always=[0]),
)
def test_everything_is_counted_once(
    request: pytest.FixtureRequest, name: str, quantisation: str, n_tokens: int
) -> None:
    """Parts, layers and types add up to what another reader of the file finds."""
    path: Path = request.getfixturevalue(f"{name}_path")
    info = ModelInfo.from_file(path)
    reader = gguf.GGUFReader(path)
    expected = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    assert sum(info.bytes_by_part.values()) == sum(info.bytes_by_type.values()) == expected
    assert info.n_parameters == sum(int(tensor.n_elements) for tensor in reader.tensors)
    assert info.bytes_by_part["other"] == 0
    assert info.tied_embedding
    assert info.quantisation == quantisation
    assert info.file_bytes == path.stat().st_size
    assert info.metadata["tokenizer.ggml.tokens"] == {"element": "str", "length": n_tokens}


def test_split_models_are_read_whole(tmp_path: Path, info: ModelInfo) -> None:
    """Three files tell the same as one."""
    first = write_tiny_gpt_oss(tmp_path / "model.gguf", n_files=3)
    split = ModelInfo.from_file(first)
    assert len(split.files) == 3
    assert split.bytes_by_part == info.bytes_by_part
    assert split.file_bytes == sum(Path(file).stat().st_size for file in split.files)


def test_arrays_of_numbers_come_with_their_values(tmp_path: Path) -> None:
    """Short ones do, of every type; text, and what is as long as a vocabulary, does not."""
    path = tmp_path / "arrays.gguf"
    writer = gguf.GGUFWriter(path, "arrays")
    arrays: dict[gguf.GGUFValueType, list[Any]] = {
        gguf.GGUFValueType.BOOL: [True, False, True],
        gguf.GGUFValueType.UINT8: [0, 255],
        gguf.GGUFValueType.INT8: [-128, 127],
        gguf.GGUFValueType.UINT16: [0, 65535],
        gguf.GGUFValueType.INT16: [-32768, 7],
        gguf.GGUFValueType.UINT32: [0, 2**32 - 1],
        gguf.GGUFValueType.INT32: list(range(-1, 4095)),
        gguf.GGUFValueType.UINT64: [2**64 - 1],
        gguf.GGUFValueType.INT64: [-(2**63), 2**53 + 1],
        gguf.GGUFValueType.FLOAT32: [0.5, -1.25],
        gguf.GGUFValueType.FLOAT64: [0.1],
    }
    for kind, values in arrays.items():
        writer.add_key_value(kind.name, values, gguf.GGUFValueType.ARRAY, kind)
    writer.add_array("text", ["one", "two"])
    writer.add_array("longer", list(range(4097)))
    writer.add_tensor("weight", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = ModelInfo.from_file(path).metadata
    for kind, values in arrays.items():
        found = metadata[kind.name]
        assert (found["length"], found["values"]) == (len(values), values)
        assert [type(value) for value in found["values"]] == [type(value) for value in values]
    assert "values" not in metadata["text"] | metadata["longer"]


def test_a_model_has_its_info(tiny_gpt_oss: Model, info: ModelInfo) -> None:
    """It is the header of the file that was loaded."""
    assert tiny_gpt_oss.info == info


def test_recommended_sampling(tmp_path: Path) -> None:
    """What the file recommends is what a stream does unless told otherwise, and `info` shows it."""
    recommended = {"temp": 0.25, "top_k": 7, "top_p": 0.5, "penalty_repeat": 1.5, "mirostat_tau": -1.0}
    path = write_tiny_gpt_oss(tmp_path / "recommends.gguf", sampling=recommended)
    expected = SamplingOptions(temperature=0.25, top_k=7, top_p=0.5, repeat_penalty=1.5)
    info = ModelInfo.from_file(path)
    assert info.sampling == expected
    assert info.recommends_sampling
    with Model(path, n_ctx=64, n_threads=1) as model:
        assert model.sampling == expected
        plain = [token.id for token in model.stream([1, 2], seed=3, max_tokens=20)]
        assert plain == [token.id for token in model.stream([1, 2], sampling=replace(expected, seed=3), max_tokens=20)]
        assert plain != [token.id for token in model.stream([1, 2], sampling=SamplingOptions(seed=3), max_tokens=20)]
    text = overspill("info", path).stdout
    assert "temperature 0.25 · top_k 7 · top_p 0.5 · min_p 0.05 · repeat_penalty 1.5 (of the file)" in " ".join(
        text.split()
    )
    facts = json.loads(overspill("info", path, "--json").stdout)
    assert facts["sampling"]["top_k"] == 7
