"""A placement is what llama.cpp makes of its arguments, by a copy of llama.cpp's own rules."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from itertools import permutations, product
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from overspill import LlamaPlacement, ModelInfo, Placement
from overspill.placement.rules import mapping_rules

GPUS = ["CUDA0", "CUDA1", "RPC0"]
KIB = 1 << 10


@pytest.fixture(scope="module")
def tiny(tiny_gpt_oss_path: Path) -> ModelInfo:
    """Return the tiny gpt-oss: experts, and an output matrix of its own."""
    return ModelInfo.from_file(tiny_gpt_oss_path)


@pytest.fixture(scope="module")
def tied(tiny: ModelInfo) -> ModelInfo:
    """Return the same with the embedding as output matrix."""
    return replace(tiny, tensors=[tensor for tensor in tiny.tensors if tensor[0] != "output.weight"])


@pytest.fixture(scope="module")
def deepseek(tiny: ModelInfo) -> ModelInfo:
    """Return a shape whose first layer has a dense part in place of experts, and with a table for all layers."""
    dense = [(f"blk.0.ffn_{name}.weight", "F32", (4, 4), 64) for name in ("gate", "up", "down")]
    kept = [tensor for tensor in tiny.tensors if not re.match(r"blk\.0\.ffn_\w+(_exps|_inp)\.", tensor[0])]
    return replace(tiny, tensors=[*kept, *dense, ("rope_freqs.weight", "F32", (4,), 16)])


@pytest.fixture(scope="module")
def models(
    tiny: ModelInfo, tied: ModelInfo, deepseek: ModelInfo, gemma_path: Path, smollm2_path: Path
) -> list[ModelInfo]:
    """Return models of several shapes."""
    return [tiny, tied, deepseek, ModelInfo.from_file(gemma_path), ModelInfo.from_file(smollm2_path)]


@dataclass
class Located:
    """Where llama.cpp puts things."""

    tensors: dict[str, str]
    kv: list[str]
    output_matrix: str


def layer_devices(arguments: LlamaPlacement, n_layers: int) -> list[str]:
    """Return the device of each layer and, as the last, of the output head.

    As llama_model_base::load_tensors in llama.cpp does, in its arithmetic.
    """
    splits = np.zeros(len(arguments.devices), np.float32)
    split_sum = np.float32(0)
    for i, split in enumerate(arguments.tensor_split):
        split_sum += np.float32(split)
        splits[i] = split_sum
    with np.errstate(invalid="ignore"):
        splits /= split_sum
    i_gpu_start = max(n_layers + 1 - arguments.n_gpu_layers, 0)
    act_gpu_layers = min(arguments.n_gpu_layers, n_layers + 1) if arguments.devices else 0
    devices = []
    for il in range(n_layers + 1):
        if il < i_gpu_start or il - i_gpu_start >= act_gpu_layers:
            devices.append("CPU")
        else:
            upper_bound = bisect_right(splits, np.float32(il - i_gpu_start) / np.float32(act_gpu_layers))
            devices.append(arguments.devices[upper_bound])
    return devices


def locate(arguments: LlamaPlacement, info: ModelInfo) -> Located:
    """Return where llama.cpp puts each tensor of the file, each KV cache, and the matrix that makes logits.

    As llama_model_loader::create_tensor does.
    """
    *layers, output = layer_devices(arguments, info.n_layers)

    def buffer(name: str, layer_device: str) -> str:
        for pattern, device in arguments.overrides:
            if re.search(pattern, name):
                return device
        return layer_device

    tensors = {}
    for name, *_ in info.tensors:
        if block := re.match(r"blk\.(\d+)\.", name):
            tensors[name] = buffer(name, layers[int(block[1])])
        elif name.startswith("token_embd"):
            tensors[name] = buffer(name, "CPU")
        elif name.startswith("output"):
            tensors[name] = buffer(name, output)
        else:
            assert name == "rope_freqs.weight"
            tensors[name] = buffer(name, layers[0])
    # Without an output matrix, a second tensor of the embedding's name is made in the output's place.
    matrix = tensors["output.weight"] if "output.weight" in tensors else buffer("token_embd.weight", output)
    return Located(tensors, layers, matrix)


def check_arguments(placement: Placement, info: ModelInfo) -> None:
    """Fail unless llama.cpp would do as the placement says."""
    arguments = placement.llama_arguments()
    located = locate(arguments, info)
    assert located.tensors == placement.tensors()
    assert located.kv == [layer.kv for layer in placement.layers] == list(placement.kv)
    norm = {placement.device_of(name) for name, *_ in info.tensors if name.startswith("output_norm")}
    assert placement.output == (located.output_matrix if norm == {located.output_matrix} else "mixed")
    assert sum(arguments.tensor_split) == arguments.n_gpu_layers <= info.n_layers + 1
    assert set(arguments.devices) == set(placement.devices_used) - {"CPU"}
    # No tensor is found twice, and nothing is in a pattern that llama-server's command line would split it at.
    for name, *_ in info.tensors:
        assert sum(re.search(pattern, name) is not None for pattern, _ in arguments.overrides) <= 1
    assert not set("".join(pattern for pattern, _ in arguments.overrides)) & set(",= ")


@st.composite
def kv_patterns(draw: st.DrawFn, n_layers: int, gpus: list[str]) -> list[str]:
    """Draw a KV cache for each layer as llama.cpp can have it."""
    order = draw(st.permutations(gpus))
    bounds = [*sorted(draw(st.lists(st.integers(0, n_layers), min_size=len(gpus), max_size=len(gpus)))), n_layers]
    runs = ["CPU"] * bounds[0]
    for gpu, first, last in zip(order, bounds, bounds[1:], strict=False):
        runs += [gpu] * (last - first)
    return runs


@st.composite
def placements(draw: st.DrawFn, info: ModelInfo) -> Placement:
    """Draw a placement: KV caches mostly as they can be, everything else anyhow, and overrides."""
    gpus = GPUS[: draw(st.integers(0, 3))]
    placement = Placement(info, gpus)
    device = st.sampled_from([*gpus, "CPU"])
    for layer, kv in enumerate(draw(kv_patterns(info.n_layers, gpus))):
        # Whole layers, so that the rest is an exception.
        placement.assign(layers=layer, part=["kv", "attention"], device=kv)
    parts = [part for part in ("attention", "dense", "experts") if info.bytes_by_part[cast(Any, part)]]
    for _ in range(draw(st.integers(0, 6))):
        first = draw(st.integers(0, info.n_layers - 1))
        layers = slice(first, draw(st.integers(first + 1, info.n_layers)), draw(st.integers(1, 2)))
        part = draw(st.sampled_from(parts))
        if any(getattr(placement.layers[layers], part)):
            placement.assign(layers=layers, part=part, device=draw(device))
    placement.output = draw(device)
    placement.embedding = draw(st.sampled_from(["CPU", "CPU", placement.output]))
    names = [re.escape(name) for name, *_ in info.tensors]
    for pattern in draw(
        st.lists(st.sampled_from([*names, r"ffn_down", r"blk\.[13]\.attn", "bias", "norm"]), max_size=3)
    ):
        if any(re.search(pattern, name) for name, *_ in info.tensors):
            placement.override(pattern, draw(device))
    return placement


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_llama_cpp_does_what_a_placement_says(models: list[ModelInfo], data: st.DataObject) -> None:
    """Every tensor and every layer's KV cache are there; JSON gives the same back."""
    info = data.draw(st.sampled_from(models))
    placement = data.draw(placements(info))
    # Of a tied embedding and its copy for the output, llama.cpp moves none or both.
    matrix = placement.output_matrix
    last = matrix if matrix not in ("CPU", *placement.kv) else placement.kv[-1]
    embedding = placement.device_of("token_embd.weight")
    if info.tied_embedding and matrix != embedding and (embedding != "CPU" or matrix != last):
        with pytest.raises(ValueError, match="tied embedding"):
            placement.llama_arguments()
    else:
        check_arguments(placement, info)
        assert len(placement.llama_arguments().overrides) <= 3 * (info.n_layers + 1)
    again = Placement.from_dict(json.loads(json.dumps(placement.to_dict())), info)
    assert again == placement
    assert str(again) == str(placement)
    assert placement.copy() == placement
    sizes = placement.bytes_by_device()
    for gpu in placement.devices:
        expected = sum(n for name, _, _, n in info.tensors if placement.device_of(name) == gpu)
        assert sizes[gpu] - expected in (0, info.bytes_by_part["embedding"] if info.tied_embedding else 0)


def reachable(n_layers: int, gpus: list[str]) -> Iterator[tuple[str, ...]]:
    """Yield every assignment of layers and output head that llama.cpp has, over all of its arguments."""
    for n_gpu_layers in range(n_layers + 2):
        for n_gpus in range(1, len(gpus) + 1):
            for order in permutations(gpus, n_gpus):
                for split in product(range(n_gpu_layers + 1), repeat=n_gpus):
                    if sum(split) == n_gpu_layers:
                        yield tuple(layer_devices(LlamaPlacement(list(order), list(split), n_gpu_layers, []), n_layers))


def test_whatever_llama_cpp_can_do_is_offered_and_nothing_else(tiny: ModelInfo, tied: ModelInfo) -> None:
    """Every KV pattern, output and embedding of 4 layers on two GPUs: expressible just when llama.cpp reaches it."""
    gpus = GPUS[:2]
    devices = [*gpus, "CPU"]
    known = set(reachable(4, gpus)) | {("CPU",) * 5}
    kv_known = {layers[:-1] for layers in known}
    for info in (tiny, tied):
        for kv in product(devices, repeat=4):
            for output, embedding in product(devices, repeat=2):
                placement = Placement(info, gpus)
                for layer, device in enumerate(kv):
                    placement.layers[layer].kv = device
                placement.output, placement.embedding = output, embedding
                possible = kv in kv_known
                if info is tied:
                    # One override moves the embedding and its copy together.
                    possible &= output == embedding or (embedding == "CPU" and (*kv, output) in known)
                if possible:
                    check_arguments(placement, info)
                else:
                    with pytest.raises(ValueError, match=r"llama\.cpp"):
                        placement.llama_arguments()


def test_overrides_are_few_and_short(tiny: ModelInfo, deepseek: ModelInfo) -> None:
    """What is alike in several layers is one pattern."""
    # Of 36 layers, by the names of the tiny one's.
    rests = {name.split(".", 2)[2] for name, *_ in tiny.tensors if name.startswith("blk.")}
    shared = [tensor for tensor in tiny.tensors if not tensor[0].startswith("blk.")]
    layers = [(f"blk.{layer}.{rest}", "F32", (1,), 4) for layer in range(36) for rest in sorted(rests)]
    big = replace(tiny, tensors=[*shared, *layers], metadata=tiny.metadata | {"gpt-oss.block_count": 36})
    placement = Placement.gpu(big, ["CUDA0"])
    assert placement.llama_arguments() == LlamaPlacement(["CUDA0"], [37], 37, [])
    placement.layers[:25].experts = "cpu"
    assert placement.llama_arguments().overrides == [(r"^blk\.([0-9]|1[0-9]|2[0-4])\.ffn_(down|gate|up)_exps\b", "CPU")]
    placement.layers[3:5].dense = placement.layers[3:5].attention = "cpu"
    overrides = placement.llama_arguments().overrides
    assert (r"^blk\.[34]\.", "CPU") in overrides
    assert len(overrides) == 2
    placement.output = "cpu"
    assert placement.llama_arguments().overrides[0] == (r"^(output|output_norm)\b", "CPU")
    check_arguments(placement, big)
    # Layers without experts do not split what the others have in common.
    mixture = Placement.gpu(deepseek, ["CUDA0"])
    mixture.assign(part=["dense", "experts"], device="cpu")
    assert len(mixture.llama_arguments().overrides) == 1
    check_arguments(mixture, deepseek)


def test_whole_layers_count_as_llama_cpps(models: list[ModelInfo]) -> None:
    """The output head is the first, the last layers come next; several GPUs share them by their memory."""

    @dataclass
    class Card:
        name: str
        memory_bytes: int

    for info in models:
        for n in (0, 1, 2, info.n_layers, info.n_layers + 1, 999):
            one = Placement.from_layers(info, ["CUDA0"], n)
            if n:
                expected = LlamaPlacement(["CUDA0"], [1], n, [])
                assert [*one.kv, one.output] == layer_devices(expected, info.n_layers)
            check_arguments(one, info)
            cards = [Card("CUDA0", 24 << 30), Card("CUDA1", 8 << 30)]
            two = Placement.from_layers(info, cards, n)
            expected = LlamaPlacement(["CUDA0", "CUDA1"], [24, 8], n, [])
            assert [*two.kv, two.output] == layer_devices(expected, info.n_layers)
            check_arguments(two, info)
        assert Placement.from_layers(info, ["CUDA0"], 0) == Placement.cpu(info) == Placement(info)


def test_edits(tiny: ModelInfo) -> None:
    """Slices, one layer, parts, patterns and aliases."""
    placement = Placement(tiny, ["CUDA0", "cuda1", "CPU"])
    assert placement.devices == ("CUDA0", "cuda1", "CPU")
    placement.layers[1:3].experts = "gpu"
    placement.layers[-1].attention = "CUDA1"
    assert placement.layers[:].experts == ("CPU", "CUDA0", "CUDA0", "CPU")
    assert placement.layers[3].attention == placement.device_of("blk.3.attn_q.weight") == "cuda1"
    placement.assign(layers=range(0, 4, 2), part=("kv", "dense"), device="cpu")
    assert [layer.dense for layer in placement.layers] == ["CPU"] * 4
    placement.override(r"\.ffn_down_exps\.", "cuda0")
    assert placement.layers[:].experts == ("mixed", "CUDA0", "CUDA0", "mixed")
    assert placement.device_of("blk.0.ffn_down_exps.weight") == "CUDA0"
    placement.layers[0].experts = "cuda1"  # an override stays in force
    assert placement.device_of("blk.0.ffn_down_exps.bias") == "CUDA0"
    placement.override("blk.0.ffn_down_exps.bias", "cpu")  # and the later one wins
    assert placement.device_of("blk.0.ffn_down_exps.bias") == "CPU"
    assert placement.overrides == ((r"\.ffn_down_exps\.", "CUDA0"), ("blk.0.ffn_down_exps.bias", "CPU"))
    placement.override("blk.0.ffn_down_exps.bias", None)
    placement.override(r"\.ffn_down_exps\.", None)
    assert placement.layers[:].experts == ("cuda1", "CUDA0", "CUDA0", "CPU")
    other = placement.copy()
    other.layers[0].kv = "gpu"
    assert other != placement
    assert placement.layers[0].kv == "CPU"


def test_mappings(tiny: ModelInfo) -> None:
    """Keys name parts, layers, parts of layers, or patterns; they hold in their order."""
    placement = Placement.from_mapping(
        tiny,
        ["CUDA0", "CUDA1"],
        {
            "default": "gpu",
            "experts": "cpu",
            "layers 1-2 experts": "gpu",
            "layers 0,3": {"attention": "CUDA1", "kv": "cpu"},
            "/ffn_gate_exps/": "CUDA1",
            "output": "cpu",
        },
    )
    assert placement.layers[:].attention == ("CUDA1", "CUDA0", "CUDA0", "CUDA1")
    assert placement.kv == ("CPU", "CUDA0", "CUDA0", "CPU")
    assert placement.device_of("blk.1.ffn_up_exps.weight") == "CUDA0"
    assert placement.device_of("blk.0.ffn_up_exps.weight") == "CPU"
    assert placement.device_of("blk.0.ffn_gate_exps.weight") == "CUDA1"
    assert placement.output == "CPU"
    whole = Placement.from_mapping(tiny, ["CUDA0"], {"default": 3, "layer 0": "gpu"})
    assert whole.kv == whole.layers[:].experts == ("CUDA0", "CPU", "CUDA0", "CUDA0")
    assert Placement.from_offload(tiny, ["CUDA0"], "gpu") == Placement.gpu(tiny, ["CUDA0"])
    assert Placement.from_offload(tiny, ["CUDA0"], 2) == Placement.from_layers(tiny, ["CUDA0"], 2)
    assert Placement.from_offload(tiny, ["CUDA0"], "cpu") == Placement.cpu(tiny)
    assert mapping_rules({"layers 0-1": "cpu"}, 4)[0].layers == (0, 1)


def test_dense_models_take_whole_layers_in_mappings(gemma_path: Path) -> None:
    """Naming layers alone means the parts that they have."""
    info = ModelInfo.from_file(gemma_path)
    placement = Placement.from_mapping(info, ["CUDA0"], {"layers 10-17": "gpu", "output": "gpu"})
    assert placement == Placement.from_layers(info, ["CUDA0"], 9)
    assert placement.layers[0].experts is None


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda p: p.assign(part="experts", device="CUDA7"), "device must be one of CUDA0, CPU"),
        (lambda p: p.assign(part="expert", device="cpu"), "part must be one of attention, dense, experts, kv"),
        (lambda p: p.assign(part="kv", layers=4, device="cpu"), "layers must be 0 to 3"),
        (lambda p: p.assign(part="output", layers=1, device="cpu"), "output belongs to no layer"),
        (lambda p: p.assign(part="kv", layers=[], device="cpu"), "none are given"),
        (lambda p: p.layers[7], "layers must be 0 to 3"),
        (lambda p: setattr(p.layers[4:], "kv", "cpu"), "selects none"),
        (lambda p: p.override("(", "cpu"), "no regular expression"),
        (lambda p: p.override("ffn_dwn", "cpu"), "matches no tensor"),
        (lambda p: p.override("ffn_down", None), "there is no override"),
        (lambda p: p.device_of("blk.9.x"), "has no tensor"),
        (lambda p: p.apply({"expert": "cpu"}), "'expert' must be one of"),
        (lambda p: p.apply({"experts": "gpu", "layers 2-9": "cpu"}), "layers must be 0 to 3"),
        (lambda p: p.apply({"layers 2-x": "cpu"}), "'layers 2-x' must be one of"),
        (lambda p: p.apply({"": "cpu"}), "must be one of"),
    ],
)
def test_mistakes_are_named(tiny: ModelInfo, edit: Any, message: str) -> None:
    """Each leaves the placement as it was."""
    placement = Placement(tiny, ["CUDA0"])
    with pytest.raises(ValueError, match=re.escape(message)):
        edit(placement)
    assert placement == Placement.cpu(tiny)


def test_more_mistakes(tiny: ModelInfo, gemma_path: Path) -> None:
    """Parts, devices and models that are not there."""
    gemma = ModelInfo.from_file(gemma_path)
    with pytest.raises(ValueError, match="no experts"):
        Placement(gemma).assign(part="experts", device="cpu")
    with pytest.raises(ValueError, match="no GPU"):
        Placement(tiny, default="gpu")
    with pytest.raises(ValueError, match="no GPU"):
        Placement.gpu(tiny, [])
    with pytest.raises(ValueError, match="given 2 times"):
        Placement(tiny, ["CUDA0", "cuda0"])
    with pytest.raises(TypeError, match="must be a sequence"):
        Placement(tiny, "CUDA0")
    with pytest.raises(TypeError, match="device must be a string"):
        Placement(tiny).layers[0].kv = cast(Any, 3)
    with pytest.raises(AttributeError):
        cast(Any, Placement(tiny).layers[0]).expert = "cpu"
    for offload in (True, "auto", None, 1.5):
        with pytest.raises(ValueError, match="offload must be"):
            Placement.from_offload(tiny, ["CUDA0"], cast(Any, offload))
    with pytest.raises(ValueError, match="n_gpu_layers must be at least 0"):
        Placement.from_offload(tiny, ["CUDA0"], -1)
    placement = Placement.gpu(tiny, ["CUDA0"])
    with pytest.raises(ValueError, match=r"for tiny gpt-oss .*\(gpt-oss, 4 layers\), not for .*gemma3, 18 layers"):
        placement.check(gemma)
    with pytest.raises(ValueError, match=r"they differ in 'blk\.0\.ffn_down_exps\.weight'"):
        changed = ("blk.0.ffn_down_exps.weight", "F32", (1,), 4)
        placement.check(replace(tiny, tensors=[changed if t[0] == changed[0] else t for t in tiny.tensors]))
    with pytest.raises(ValueError, match="uses CUDA0, but the devices here are RPC0, CPU"):
        placement.check(tiny, ["RPC0"])
    placement.check(tiny, ["RPC0", "CUDA0"])


def test_files(tiny: ModelInfo, gemma_path: Path, tmp_path: Path) -> None:
    """What was saved is loaded, with or without the model at hand; anything else is refused."""
    placement = Placement.gpu(tiny, ["CUDA0"])
    placement.layers[1:].experts = "cpu"
    placement.kv_bytes_by_layer = [KIB] * 4
    file = tmp_path / "placement.json"
    placement.save(file)
    assert Placement.load(file) == Placement.load(file, tiny) == placement
    assert str(Placement.load(file)) == str(placement)
    with pytest.raises(ValueError, match="not for"):
        Placement.load(file, ModelInfo.from_file(gemma_path))
    whole = json.loads(file.read_text())
    for key in ("model", "devices", "layers", "output", "embedding", "overrides"):
        broken = {name: value for name, value in whole.items() if name != key}
        with pytest.raises(ValueError, match=f"this is no placement: '{key}' is missing"):
            Placement.from_dict(broken)
    for key, value in {"layers": whole["layers"][1:], "output": "CUDA1", "overrides": [["x"]], "model": 3}.items():
        with pytest.raises(ValueError, match="this is no placement"):
            Placement.from_dict(whole | {key: value})
    file.write_text("{")
    with pytest.raises(ValueError, match=r"placement\.json is no JSON"):
        Placement.load(file)


def shown(tiny: ModelInfo) -> Placement:
    """Return a placement with something of everything."""
    placement = Placement.gpu(replace(tiny, metadata=tiny.metadata | {"general.name": "<b>a & b"}), ["CUDA0", "RPC0"])
    placement.layers[:2].experts = "cpu"
    placement.override(r"blk\.3\.ffn_down_exps", "cpu")
    placement.kv_bytes_by_layer = [512 * KIB] * 4
    placement.expert_cache = {"CUDA0": 3 * KIB**2}
    return placement


def test_the_terminal_table(tiny: ModelInfo) -> None:
    """Equal layers are folded, what is split says so, and the bytes add up."""
    placement = shown(tiny)
    lines = str(placement).splitlines()
    assert max(map(len, lines)) <= 80
    rows = {line.split("  ")[0].strip(): line.replace("\N{NO-BREAK SPACE}", " ") for line in lines}
    experts = sum(tensor[3] for tensor in tiny.layer_tensors[0]["experts"])
    assert f"CPU {2 * experts / KIB**2:.1f} MiB" in rows["0-1"]
    assert "mixed" in rows["3"]
    assert "mixed" not in rows["2"]
    for device, n_bytes in placement.bytes_by_device().items():
        assert f"{device} {n_bytes / KIB**2:.1f} MiB" in rows["all weights"]
    assert "CUDA0 1.5 MiB · RPC0 512 KiB" in rows["all KV caches"]
    assert "CUDA0 3.0 MiB" in rows["cache of experts"]
    assert r"blk\.3\.ffn_down_exps → CPU" in rows["override"]
    console = Console(width=200, force_terminal=True, color_system="standard")
    with console.capture() as captured:
        console.print(placement)
    assert "\x1b[" in captured.get()


def test_the_table_of_a_dense_model_has_no_experts(gemma_path: Path) -> None:
    """Parts that a model lacks are left out; the copy of a tied embedding is counted."""
    info = ModelInfo.from_file(gemma_path)
    placement = Placement.gpu(info, ["CUDA0"])
    assert "experts" not in str(placement)  # nor a cache of them
    assert "output (copy of embedding)" in str(placement)
    embedding = info.bytes_by_part["embedding"]
    assert sum(placement.bytes_by_device().values()) == sum(info.bytes_by_part.values()) + embedding


class Tags(HTMLParser):
    """Collects the elements and the texts of a page, and notices what is left open."""

    def __init__(self, page: str) -> None:
        """Read it."""
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take note of an element."""
        self.tags.append(tag)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Check that the innermost is closed."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Keep the text."""
        self.text.append(data.replace("\N{NO-BREAK SPACE}", " "))


def test_the_html_table(tiny: ModelInfo) -> None:
    """One table below the map of memory, closed, without scripts, with the texts of the terminal's."""
    placement = shown(tiny)
    page = Tags(placement._repr_html_())
    assert not page.open
    assert set(page.tags) == {"div", "strong", "table", "caption", "tr", "th", "td", "br", "code", "span"}
    assert page.tags.count("table") == 1
    assert "<b>a & b (gpt-oss, 4 layers)" in page.text
    sizes = [f"{device} {n / KIB**2:.1f} MiB" for device, n in placement.bytes_by_device().items()]
    assert set(sizes) <= set(page.text)
    assert "mixed" in page.text


def test_server_flags(tiny: ModelInfo) -> None:
    """They say what the arguments say; settings have our names."""
    placement = Placement.gpu(tiny, ["CUDA0", "RPC0"])
    placement.layers[1].experts = "RPC0"
    flags = placement.server_flags(
        buffer_types={"RPC0": "RPC0[10.0.0.2:50052]"},
        n_ctx=8192,
        type_k="q8_0",
        load_mode="read",
        n_threads=None,
        rpc=["10.0.0.2:50052"],
    )
    arguments = placement.llama_arguments()
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    assert flags[0] == "--rpc"
    assert given == {
        "--rpc": "10.0.0.2:50052",
        "--device": "CUDA0,RPC0",
        "--n-gpu-layers": "5",
        "--tensor-split": ",".join(map(str, arguments.tensor_split)),
        "--override-tensor": r"^blk\.1\.ffn_(down|gate|up)_exps\b=RPC0[10.0.0.2:50052]",
        "--fit": "off",
        "--ctx-size": "8192",
        "--cache-type-k": "q8_0",
        "--load-mode": "none",
    }
    assert Placement.cpu(tiny).server_flags()[:4] == ["--device", "none", "--n-gpu-layers", "0"]
    with pytest.raises(TypeError, match="n_contexts is none of n_ctx"):
        placement.server_flags(n_contexts=1)


def test_what_is_in_the_way_is_named(tiny: ModelInfo) -> None:
    """Where llama.cpp cannot do it, the error says which layer's KV cache is at fault."""
    placement = Placement.gpu(tiny, ["CUDA0", "CUDA1"])
    placement.layers[1].kv = "cpu"
    with pytest.raises(ValueError, match="layer 1's cannot be on the CPU after layer 0's on CUDA0"):
        placement.llama_arguments()
    placement.layers[1].kv = "CUDA1"
    placement.layers[2].kv = "CUDA0"
    with pytest.raises(ValueError, match="layer 2's cannot be on CUDA0 again after layer 1's on CUDA1"):
        placement.llama_arguments()
