"""Values in place of a header's own, against files that were rewritten with these values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

import overspill
from overspill import Error, Hardware, Model, ModelInfo
from overspill.planning.tuned import kept_file

KINDS = {
    bool: gguf.GGUFValueType.BOOL,
    int: gguf.GGUFValueType.UINT32,
    float: gguf.GGUFValueType.FLOAT32,
    str: gguf.GGUFValueType.STRING,
}


def rewritten(source: Path, target: Path, values: dict[str, Any]) -> Path:
    """Write a copy of a file with these values in its header."""
    reader = gguf.GGUFReader(source, "r")
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, architecture)
    changes = {key: MetadataDetails(KINDS[type(value)], value) for key, value in values.items()}
    copy_with_new_metadata(reader, writer, changes, [])
    return target


def logits_of(path: Path | ModelInfo, **options: Any) -> npt.NDArray[np.float32]:
    """Return the logits after each token of a text, with one thread."""
    with Model(path, n_ctx=128, n_threads=1, **options) as model:
        return model.eval(list(range(300, 332)), logits="all").copy()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("smollm2", {"llama.rope.freq_base": 5e5}),
        ("smollm2", {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}),  # which the file has not
        ("tiny_gpt_oss", {"gpt-oss.rope.freq_base": 1e4, "gpt-oss.rope.scaling.type": "none"}),
        ("tiny_gpt_oss", {"gpt-oss.expert_used_count": 2}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_gpu")
def test_a_model_is_that_of_a_rewritten_file(
    smollm2_path: Path, tiny_gpt_oss_path: Path, tmp_path: Path, name: str, values: dict[str, Any]
) -> None:
    """Bit for bit, and not that of the file as it was."""
    path = {"smollm2": smollm2_path, "tiny_gpt_oss": tiny_gpt_oss_path}[name]
    file = rewritten(path, tmp_path / "rewritten.gguf", values)
    wanted = logits_of(file)
    info = ModelInfo.from_file(path).with_overrides(values)
    assert info.metadata == ModelInfo.from_file(file).metadata
    assert np.array_equal(logits_of(path, overrides=values), wanted)
    assert np.array_equal(logits_of(info), wanted)
    assert not np.array_equal(logits_of(path), wanted)


@pytest.mark.usefixtures("no_gpu")
def test_what_follows_from_a_value_follows(tiny_gpt_oss_path: Path, tmp_path: Path) -> None:
    """The default context, the plan's bytes, and sampling and tokens."""
    values = {"gpt-oss.context_length": 512, "gpt-oss.expert_used_count": 1, "tokenizer.ggml.add_bos_token": True}
    info = ModelInfo.from_file(tiny_gpt_oss_path).with_overrides(values)
    file = ModelInfo.from_file(rewritten(tiny_gpt_oss_path, tmp_path / "rewritten.gguf", values))
    assert (info.n_ctx_train, info.default_n_ctx, info.n_experts_used) == (512, 512, 1)
    assert info.bytes_per_token == file.bytes_per_token < ModelInfo.from_file(tiny_gpt_oss_path).bytes_per_token
    hardware = Hardware.given(ram="8GiB", vram="1GiB", n_threads=1)
    planned, expected = (overspill.plan(one, hardware=hardware).forecast() for one in (info, file))
    assert planned == expected
    with Model(info, n_threads=1) as model, Model(file, n_threads=1) as other:
        assert model.n_ctx == other.n_ctx == 512
        assert model.info is info
        assert model.tokenize("Hello") == other.tokenize("Hello")
        assert len(model.tokenize("Hello")) == 1 + len(model.tokenize("Hello", add_special=False))
        assert model.memory == other.memory


def test_sampling_that_is_replaced(smollm2_path: Path, tmp_path: Path) -> None:
    """The header's recommendation is the model's."""
    file = rewritten(smollm2_path, tmp_path / "sampled.gguf", {"general.sampling.temp": 0.25})
    values = {"general.sampling.temp": 0.0}
    with Model(file, overrides=values, n_ctx=64) as model:
        assert model.sampling == ModelInfo.from_file(file).with_overrides(values).sampling
        assert model.sampling.temperature == 0


def test_what_is_kept_of_a_model_is_not_for_another_header(tiny_gpt_oss_path: Path) -> None:
    """What ``tune`` finds with other values is no result for the file as it is."""
    info = ModelInfo.from_file(tiny_gpt_oss_path)
    fewer = info.with_overrides({"gpt-oss.expert_used_count": 1})
    assert kept_file(info, "tuned") == kept_file(ModelInfo.from_file(tiny_gpt_oss_path), "tuned")
    assert kept_file(info, "tuned") != kept_file(fewer, "tuned")


def test_later_values_win_and_the_file_stays(tiny_gpt_oss_path: Path) -> None:
    """Overrides of an overridden header add up; the one before does not change."""
    info = ModelInfo.from_file(tiny_gpt_oss_path)
    first = info.with_overrides({"gpt-oss.context_length": 512, "gpt-oss.rope.freq_base": 5})
    second = first.with_overrides({"gpt-oss.context_length": 256})
    assert second.overrides == {"gpt-oss.context_length": 256, "gpt-oss.rope.freq_base": 5.0}
    assert (info.n_ctx_train, first.n_ctx_train, second.n_ctx_train) == (131072, 512, 256)
    assert ModelInfo.from_file(second) is second
    assert info.overrides == {}
    assert info.with_overrides({}) == info


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("gpt-oss.rope.freq_bas", 1.0, "did you mean gpt-oss.rope.freq_base"),
        ("bogus", 1, "the model has no bogus"),
        ("gpt-oss.block_count", "4", "gpt-oss.block_count must be an integer, not a text ('4')"),
        ("gpt-oss.block_count", 4.0, "gpt-oss.block_count must be an integer, not a number (4.0)"),
        ("gpt-oss.block_count", True, "gpt-oss.block_count must be an integer, not true or false (True)"),
        ("gpt-oss.block_count", -1, "gpt-oss.block_count must be 0 to 4294967295"),
        ("gpt-oss.rope.freq_base", True, "gpt-oss.rope.freq_base must be a number, not true or false (True)"),
        ("gpt-oss.rope.freq_base", 1e39, "gpt-oss.rope.freq_base must be a finite number"),
        ("tokenizer.ggml.add_bos_token", 1, "add_bos_token must be true or false, not an integer (1)"),
        ("general.name", "x" * 128, "general.name must be a text of at most 127 bytes"),
        ("tokenizer.ggml.tokens", "x", "tokenizer.ggml.tokens cannot be replaced"),
        ("tokenizer.chat_template", "x", "set model.chat_template"),
        ("general.architecture", "llama", "general.architecture cannot be replaced"),
        ("split.count", 2, "split.count cannot be replaced"),
    ],
)
def test_mistakes_name_the_key(tiny_gpt_oss_path: Path, key: str, value: Any, text: str) -> None:
    """Before anything is loaded, for headers and models alike."""
    info = ModelInfo.from_file(tiny_gpt_oss_path)
    for refuse in (
        lambda: info.with_overrides({key: value}),
        lambda: Model(tiny_gpt_oss_path, overrides={key: value}),
    ):
        with pytest.raises(ValueError, match="overrides: ") as caught:
            refuse()
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"gpt-oss.block_count": 0}, "block_count is 0; it must be 1 to 512"),
        ({"gpt-oss.attention.head_count": 0}, "head_count is 0"),
        ({"gpt-oss.expert_used_count": 9}, "it must be 1 to 8"),
        ({"gpt-oss.rope.scaling.type": "bent"}, "it must be none, linear, yarn or longrope"),
    ],
    ids=str,
)
def test_figures_that_llama_cpp_would_end_the_process_for(
    tiny_gpt_oss_path: Path, values: dict[str, Any], text: str
) -> None:
    """They are the caller's mistakes, and the file is not called damaged."""
    with pytest.raises(ValueError, match=r"^overrides: ") as caught:
        Model(tiny_gpt_oss_path, overrides=values, n_ctx=64)
    assert text in str(caught.value)
    assert "damaged" not in str(caught.value)


def test_fewer_layers_than_weights_are_an_error(tiny_gpt_oss_path: Path) -> None:
    """llama.cpp says so."""
    with pytest.raises(Error):
        Model(tiny_gpt_oss_path, overrides={"gpt-oss.block_count": 3}, n_ctx=64)
