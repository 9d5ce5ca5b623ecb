"""Wrong arguments: every public function names the one that is wrong, and none ends in another exception."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import importlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Set
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import overspill
from compat_calls import compat_calls
from overspill import AsyncStream, Cascade, Chat, ChatTemplate, Error, Hardware, Model, ModelInfo, Placement, Sampler
from overspill.compat import Llama
from overspill.engine.reply import ToolCall
from overspill.guidance import Guidance
from public_api import HANDED_OUT, INTERNAL, PUBLIC_MODULES

# Of the dataclasses those that a caller makes; the others are handed out, and hold whatever is put into them.
GIVEN = {"DeviceSpec", "Hardware", "SamplingOptions"}
LISTING = Path(__file__).parent / "public_api.txt"


def nested(depth: int) -> list[Any]:
    """Return lists in lists."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def itself() -> list[Any]:
    """Return a list that is in itself."""
    value: list[Any] = []
    value.append(value)
    return value


class Anything:
    """What can be made of anything, and is nothing that is wanted."""

    def __init__(self, *arguments: object) -> None: ...


class Hostile:
    """What raises whenever it is looked at."""

    def __repr__(self) -> str:
        raise RuntimeError("this has no text")


VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "bytes": lambda: b"text",
    "text": lambda: "text",
    "empty text": lambda: "",
    "half of a pair": lambda: "a\ud800b",
    "NUL": lambda: "a\0b",
    "long text": lambda: "word " * 50_000,
    "zero": lambda: 0,
    "three": lambda: 3,
    "negative": lambda: -1,
    "2**31": lambda: 2**31,
    "2**63": lambda: 2**63,
    "huge": lambda: 10**5000,
    "huge, negative": lambda: -(10**5000),
    "fraction": lambda: 1.5,
    "nan": lambda: float("nan"),
    "infinite": lambda: float("inf"),
    "minus infinite": lambda: float("-inf"),
    "tiny": lambda: 5e-324,
    "complex": lambda: 1j,
    "True": lambda: True,
    "False": lambda: False,
    "list": list,
    "list of None": lambda: [None],
    "list of numbers": lambda: [0, 1],
    "list of huge numbers": lambda: [10**30],
    "list of text and bytes": lambda: ["a", b"b"],
    "list of half a pair": lambda: ["\ud800"],
    "list of NUL": lambda: ["\0"],
    "list of dicts": lambda: [{"role": "user", "content": "\ud800"}, {"a": {}}],
    "list of lists": lambda: [[0], [None]],
    "nested list": lambda: nested(5_000),
    "list in itself": itself,
    "tuple": lambda: (1, "a"),
    "dict": dict,
    "dict of None": lambda: {"a": None},
    "dict of numbers": lambda: {1: 2, -1: float("nan")},
    "dict of huge numbers": lambda: {10**30: 10**400},
    "dict of half a pair": lambda: {"\ud800": "\ud800"},
    "dict of bytes": lambda: {b"a": b"b"},
    "nested dict": lambda: {"a": nested(5_000)},
    "set": lambda: {1},
    "range": lambda: range(3),
    "slice": lambda: slice(1, 0),
    "generator": lambda: (i for i in ("a", b"b")),
    "object": object,
    "hostile object": Hostile,
    "class": lambda: Anything,
    "function": lambda: lambda *arguments, **keywords: None,
    "path": lambda: Path("none/such"),
    "numpy integer": lambda: np.int64(2),
    "numpy float": lambda: np.float32("nan"),
    "numpy bool": lambda: np.True_,
    "numpy text": lambda: np.str_("text"),
    "0-d array": lambda: np.array(2),
    "array of integers": lambda: np.array([1, 2]),
    "array of floats": lambda: np.array([1.5, 2.5], np.float32),
    "array of doubles": lambda: np.array([1.5, 2.5]),
    "array of rows": lambda: np.zeros((2, 2), np.float32),
    "array with strides": lambda: np.zeros(8, np.float32)[::2],
    "array backwards": lambda: np.zeros(8, np.float32)[::-1],
    "array of the other byte order": lambda: np.zeros(4, ">f4"),
    "read-only array": lambda: np.frombuffer(bytes(16), np.float32),
    "empty array": lambda: np.zeros(0, np.float32),
    "array of objects": lambda: np.array([None, "a"], object),
    "array of nan": lambda: np.full(4, np.nan, np.float32),
}
# What an error may call a parameter besides.
ALSO = {
    "data": ("no placement", "no hardware that was saved"),
    "device": ("pattern",),
    "messages": ("prompt",),
    "name": ("device",),
    "path": ("no placement", "no JSON", "no .npz file"),
}
COLLECTIONS = {"Sequence", "Iterable", "Mapping", "NDArray", "list", "dict", "tuple", "frozenset", "Message"}


@cache
def aliases() -> dict[str, str]:
    """Return what the names of types stand for."""
    lines = LISTING.read_text(encoding="utf-8").splitlines()
    return {found[1]: found[2] for line in lines if (found := re.fullmatch(r"([A-Z]\w+) = (.+)", line))}


def words_of(annotation: str) -> set[str]:
    """Return the names in a type, and in what these stand for."""
    words = set(re.findall(r"\w+", annotation))
    for word in list(words):
        if word in aliases():
            words |= words_of(aliases()[word])
    return words


def cannot_be(value: object, annotation: str) -> bool:
    """Return whether a value is certainly not of a type."""
    words = words_of(annotation)
    if words & {"Any", "object", "T"} and not words & COLLECTIONS:
        return False
    if value is None:
        return "None" not in words
    if isinstance(value, bytes):
        return "bytes" not in words
    if isinstance(value, str):
        return not words & {"str", "Literal"}
    if isinstance(value, bool | np.bool_):
        return not words & {"bool", "int", "float", "SupportsIndex", "Any"}
    if isinstance(value, int | np.integer):
        return not words & {"int", "float", "SupportsIndex", "Any"} and not (words & {"bool"} and value in (0, 1))
    if isinstance(value, float | np.floating):
        return not words & {"float", "Any"}
    if isinstance(value, list | tuple | dict | set) or (isinstance(value, np.ndarray) and value.ndim):
        return not words & COLLECTIONS
    return False


# --- what there is to be called


@cache
def public_callables() -> dict[str, Callable[..., Any] | property]:
    """Return everything public that takes an argument, by its name."""
    found: dict[str, Any] = {}
    for module in map(importlib.import_module, PUBLIC_MODULES):
        for name in module.__all__:
            value = getattr(module, name)
            if not isinstance(value, type):
                if callable(value) and not hasattr(value, "__origin__"):
                    found[name] = value
            elif not issubclass(value, BaseException | enum.Enum | tuple) and not getattr(value, "_is_protocol", False):
                if name not in HANDED_OUT and (not dataclasses.is_dataclass(value) or name in GIVEN):
                    found[name] = value
                for member in dir(value):
                    found |= {f"{name}.{member}": one for one in members(value, member)}
    return {name: one for name, one in found.items() if isinstance(one, property) or parameters(one)}


def members(cls: type, name: str) -> Iterator[Any]:
    """Yield a method or a property that can be set."""
    value = inspect.getattr_static(cls, name)
    if name.startswith("_") or f"{cls.__name__}.{name}" in INTERNAL or not is_ours(value):
        return
    if inspect.isfunction(value) or isinstance(value, classmethod | staticmethod):
        yield getattr(cls, name)
    elif isinstance(value, property) and value.fset is not None:
        yield value


def is_ours(member: object) -> bool:
    """Return whether a member is the package's, and not of a base class."""
    function = getattr(member, "fset", None) or member
    return str(getattr(function, "__module__", "")).startswith("overspill")


def parameters(function: Callable[..., Any]) -> dict[str, str]:
    """Return the types of a function's parameters by name; of ``**keywords`` those that are known."""
    found: dict[str, str] = {}
    for parameter in inspect.signature(function).parameters.values():
        kind = str(parameter.annotation)
        if parameter.kind is parameter.VAR_KEYWORD:
            if "SamplingKeywords" in kind:
                kinds = overspill.SamplingOptions.__annotations__  # each is tried where they are made
                found |= {name: str(kinds[name]) for name in ("temperature", "logit_bias", "seed")}
            else:
                found["no_such_option"] = "Never"
        elif parameter.name not in ("self", "form"):
            found[parameter.name] = kind
    return found


def annotation_of(path: str, name: str) -> str:
    """Return the type of a parameter, or of a property that is set."""
    one = public_callables()[path]
    if isinstance(one, property):
        assert one.fset is not None
        return str(list(inspect.signature(one.fset).parameters.values())[1].annotation)
    return parameters(one)[name]


class World:
    """Something of every kind to call, and the arguments that are right."""

    def __init__(self, file: Path, folder: Path) -> None:
        """Load a model."""
        self.file, self.folder = file, folder
        self.model = Model(file, n_ctx=64, n_threads=1, offload="cpu")
        self.model.chat_template = ChatTemplate(self.model, "{% for m in messages %}{{ m.content }}{% endfor %}")
        self.llm = Llama(file, n_ctx=64, n_threads=1)
        self.llm.model.chat_template = ChatTemplate(self.llm.model, self.model.chat_template.source)
        self.info = ModelInfo.from_file(file)
        self.hardware = Hardware.given(ram="8GiB", vram="1GiB", n_threads=1)

    def placement(self) -> Placement:
        """Return one to edit."""
        return Placement(self.info, ["CUDA0"])

    def chat(self) -> Chat:
        """Return a conversation of one message."""
        chat = Chat(self.model, max_tokens=1)
        chat.messages.append({"role": "user", "content": "Hello"})
        return chat

    def on(self, make: Callable[[], Any], name: str) -> Callable[..., Any]:
        """Return a function that calls a method of something new, or sets its property."""
        if isinstance(inspect.getattr_static(type(make()), name, None), property):
            return lambda **given: setattr(make(), name, given[name])
        return lambda **given: getattr(make(), name)(**given)

    def calls(self) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
        """Return each function, and arguments with which it works, by name."""
        model, missing = self.model, self.folder / "missing.gguf"
        loaded = {"n_ctx": 64, "n_threads": 1, "offload": "cpu"}
        options = {"max_tokens": 1}
        planned = overspill.plan(self.info, hardware=self.hardware)
        logits = np.zeros(4, np.float32)
        routes = np.arange(96, dtype=np.uint16).reshape(6, 4, 4) % 8
        trace = overspill.ExpertTrace((routes,), (0,), 8, (0, 1, 2, 3), "a router")
        trace.save(self.folder / "trace.npz")
        cache = overspill.plan_expert_cache(self.info, self.hardware)
        study = overspill.replay_experts(trace, resident=[0.5], cache=cache)
        settings = {"info": self.info, "devices": ["CUDA0"]}
        found: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
            "Cascade": (Cascade, {"small": model, "large": model}),
            "Chat": (Chat, {"model": model}),
            "ChatTemplate": (ChatTemplate, {"model": model}),
            "DeviceSpec": (
                overspill.DeviceSpec,
                {"name": "CPU", "kind": "cpu", "memory_bytes": 1, "bandwidth_bytes_per_s": 1.0},
            ),
            "DeviceSpec.batch_flops": (self.hardware.cpu.batch_flops, {"weights": "f16"}),
            "DeviceSpec.copy_bytes_per_s": (self.hardware.cpu.copy_bytes_per_s, {"pinned": True}),
            "DeviceSpec.rate": (self.hardware.cpu.rate, {"weights": "f16"}),
            "ExpertCachePlan.resident_bytes": (cache.resident_bytes, {"share": 0.5}),
            "ExpertCachePlan.tokens_per_s": (cache.tokens_per_s, {"hit_share": 0.5}),
            "ExpertStudy.plot": (study.plot, {"file": self.folder / "experts.png"}),
            "ExpertStudy.tokens_per_s": (study.tokens_per_s, {"replay": study.replays[0]}),
            "ExpertTrace.counts": (trace.counts, {}),
            "ExpertTrace.load": (overspill.ExpertTrace.load, {"path": self.folder / "trace.npz"}),
            "ExpertTrace.repeated_share": (trace.repeated_share, {}),
            "ExpertTrace.replay": (trace.replay, {"policy": "lru", "resident": 0.5}),
            "ExpertTrace.reuse_distances": (trace.reuse_distances, {}),
            "ExpertTrace.routes": (trace.routes, {}),
            "ExpertTrace.save": (trace.save, {"path": self.folder / "saved.npz"}),
            "Guidance": (Guidance, {"model": model, "regex": "a"}),
            "Guidance.accept": (self.on(lambda: Guidance(model, regex="a"), "accept"), {"token": 3}),
            "Hardware": (Hardware, {"devices": self.hardware.devices, "source": "given", "n_threads": 1}),
            "Hardware.device": (self.hardware.device, {"name": "CPU"}),
            "Hardware.from_dict": (Hardware.from_dict, {"data": self.hardware.to_dict()}),
            "Hardware.given": (Hardware.given, {"ram": "8GiB", "vram": "1GiB"}),
            "Hardware.here": (Hardware.here, {"measure": False}),
            "Hardware.without": (self.hardware.without, {"taken": {"CPU": 1}}),
            "Model": (Model, {"path": self.file, **loaded}),
            "ModelInfo.from_file": (ModelInfo.from_file, {"path": self.file}),
            "ModelInfo.with_overrides": (self.info.with_overrides, {"overrides": {}}),
            "ModelInfo.read_bytes": (self.info.read_bytes, {"tensor": self.info.tensors[0]}),
            "Plan.for_hardware": (planned.for_hardware, {"hardware": self.hardware}),
            "Plan.whole_layers_tokens_per_s": (self.on(planned.copy, "whole_layers_tokens_per_s"), {}),
            "Sampler": (Sampler, {"model": model}),
            "SamplingOptions": (overspill.SamplingOptions, {}),
            "SamplingOptions.from_metadata": (
                overspill.SamplingOptions.from_metadata,
                {"value_of": lambda name: None},
            ),
            "add_rpc_server": (overspill.add_rpc_server, {"endpoint": "127.0.0.1:1"}),
            "bench": (overspill.bench, {"path": missing}),
            "compare": (overspill.compare, {"models": [missing, missing], "questions": "Hello"}),
            "forecast": (
                overspill.forecast,
                {"info": self.info, "placement": Placement.cpu(self.info), "hardware": self.hardware},
            ),
            "mean_entropy": (overspill.mean_entropy, {}),
            "mean_logprob": (overspill.mean_logprob, {}),
            "plan": (overspill.plan, {"model": self.info, "hardware": self.hardware}),
            "plan_expert_cache": (overspill.plan_expert_cache, {"info": self.info, "hardware": self.hardware}),
            "replay_experts": (overspill.replay_experts, {"trace": trace}),
            "resolve": (importlib.import_module("overspill.hub").resolve, {"path": self.file}),
            "trace_experts": (overspill.trace_experts, {"path": missing, "prompts": "Hello"}),
            "tune": (overspill.tune, {"path": missing}),
            "ubatch_trade": (overspill.ubatch_trade, {"model": self.info, "hardware": self.hardware}),
        }
        state_file = self.folder / "saved.state"
        model.generate([1, 2, 3], max_tokens=1)
        model.save_state(state_file)
        methods: dict[str, tuple[Callable[[], Any], dict[str, dict[str, Any]]]] = {
            "Cascade": (
                lambda: Cascade(model, model),
                {"chat": {"messages": "Hello", **options}, "stream": {"prompt": "Hello", **options}},
            ),
            "Chat": (
                self.chat,
                {
                    "add_result": {"call": ToolCall("f", {}, ""), "result": ""},
                    "retry": {},
                    "save": {"path": self.folder / "chat.json"},
                    "ask": {"message": "Hello"},
                    "send": {"message": "Hello"},
                    "system": {},
                },
            ),
            "ChatTemplate": (lambda: model.chat_template, {"render": {"messages": "Hello"}}),
            "Model": (
                lambda: model,
                {
                    "aask": {"prompt": "Hello", **options},
                    "achat": {"messages": "Hello", **options},
                    "ask": {"prompt": "Hello", **options},
                    "astream": {"prompt": "Hello", **options},
                    "chat": {"messages": "Hello", **options},
                    "detokenize": {"tokens": [1]},
                    "dry_breakers": {"texts": ["a"]},
                    "eval": {"tokens": [1]},
                    "generate": {"prompt": "Hello", **options},
                    "generate_many": {"prompts": ["Hello"], **options},
                    "is_end_of_generation": {"token": 1},
                    "load_state": {"path": state_file},
                    "save_state": {"path": self.folder / "saved again.state"},
                    "stream": {"prompt": "Hello", **options},
                    "token_bytes": {"token": 1},
                    "tokenize": {"text": "Hello"},
                },
            ),
            "Sampler": (
                lambda: Sampler(seed=1),
                {
                    "accept": {"token": 1},
                    "distribution": {"logits": logits},
                    "sample": {"logits": logits},
                    "state": {},
                },
            ),
        }
        placements: dict[str, dict[str, Any]] = {
            "apply": {"mapping": {"experts": "gpu"}},
            "assign": {"part": "experts", "device": "gpu"},
            "check": {"info": self.info},
            "device_of": {"tensor": self.info.tensors[0][0]},
            "embedding": {},
            "kv_bytes_by_layer": {},
            "expert_cache": {},
            "output": {},
            "override": {"pattern": "ffn", "device": "gpu"},
            "read_back": {"tensors": {}, "kv": []},
            "save": {"path": self.folder / "placement.json"},
            "server_flags": {},
        }
        for name, given in placements.items():
            found[f"Placement.{name}"] = self.on(self.placement, name), given
            found[f"Plan.{name}"] = self.on(planned.copy, name), given
        saved = self.folder / "saved.json"
        self.placement().save(saved)
        makers: dict[str, dict[str, Any]] = {
            "cpu": {"info": self.info},
            "from_dict": {"data": self.placement().to_dict()},
            "from_layers": {**settings, "n_gpu_layers": 1},
            "from_mapping": {**settings, "mapping": {}},
            "from_offload": {**settings, "offload": "gpu"},
            "gpu": settings,
            "load": {"path": saved},
        }
        for name, given in makers.items():
            found[f"Placement.{name}"] = getattr(Placement, name), given
            found[f"Plan.{name}"] = getattr(overspill.Plan, name), given
        found["Placement"] = Placement, {"info": self.info}
        chat_file = self.folder / "saved chat.json"
        self.chat().save(chat_file)
        found["Chat.load"] = Chat.load, {"path": chat_file, "model": model}
        for kind, (make, calls) in methods.items():
            found |= {f"{kind}.{name}": (self.on(make, name), given) for name, given in calls.items()}
        return found | compat_calls(self.llm, self.folder)


def use(result: object) -> None:
    """Take what a call returns as far as its first steps."""
    if isinstance(result, AsyncStream):

        async def begin() -> None:
            async with result:
                async for _ in result:
                    break

        asyncio.run(begin())
    elif inspect.iscoroutine(result):
        asyncio.run(result)
    elif isinstance(result, Model | Cascade | Llama):
        result.close()
    elif isinstance(result, overspill.Stream | overspill.ChatStream | overspill.CascadeStream):
        with result:
            list(itertools.islice(result, 2))
    elif inspect.isgenerator(result):
        list(itertools.islice(result, 2))


@pytest.fixture(scope="module")
def world(tiny_gpt_oss_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    """Return each public function with arguments that are right; writing goes to a folder of its own."""
    folder = tmp_path_factory.mktemp("arguments")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        made = World(tiny_gpt_oss_path, folder)
        yield made.calls()
        made.model.close()
        made.llm.close()


def problem(call: Callable[..., Any], given: dict[str, Any], name: str, value: object, annotation: str) -> str:
    """Return what is wrong with the outcome of a call with one wrong argument; nothing if it is as it should be."""
    try:
        use(call(**{**given, name: value}))
    except Error as error:
        said = str(error)
    except (TypeError, ValueError) as error:
        said = str(error)
        if type(error) not in (TypeError, ValueError):
            return f"{type(error).__name__}: {said:.200}"
        names = "|".join(map(re.escape, (name, *ALSO.get(name, ()))))
        if not re.search(rf"(?<![A-Za-z0-9])({names})(?![A-Za-z0-9])", said) or "incompatible function" in said:
            return f"not named: {type(error).__name__}: {said:.200}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    else:
        return "is taken" if cannot_be(value, annotation) else ""
    if "\n" in said:
        return "several lines"
    return "too long" if len(said) > 1000 and not isinstance(value, str) else ""


# Not what would take long, a measurement and a download, and no lists.
NAMES = sorted(
    set(public_callables()) - {"Bench.plot", "Llama.from_pretrained", "LogitsProcessorList", "StoppingCriteriaList"}
)
# Of a value of each kind, the one that most code does not expect.
QUICK_VALUES: tuple[str, ...] = (
    "None",
    "bytes",
    "half of a pair",
    "huge",
    "nan",
    "list of None",
    "nested list",
    "dict of numbers",
)
QUICK_VALUES += ("hostile object", "array of integers", "numpy text", "text")
LOADS = {"Cascade", "Hardware.here", "Llama", "Model", "add_rpc_server", "plan", "ubatch_trade"}

Calls = dict[str, tuple[Callable[..., Any], dict[str, Any]]]


def check(world: Calls, path: str, values: Iterable[str]) -> None:
    """Call a public function with each of some values for each of its parameters."""
    call, given = world[path]
    one = public_callables()[path]
    names = [path.rpartition(".")[2]] if isinstance(one, property) else list(parameters(one))
    found = [
        f"{name} = {label}: {what}"
        for name in names
        for label in values
        if (what := problem(call, given, name, VALUES[label](), annotation_of(path, name)))
    ]
    assert not found, "\n" + "\n".join(found)


def test_every_public_function_is_called(world: Calls) -> None:
    """What is added to the API is added here."""
    assert set(world) == set(NAMES)


@pytest.mark.parametrize("path", [name for name in NAMES if name not in LOADS])
def test_a_wrong_argument_is_named(world: Calls, path: str) -> None:
    """Every parameter of the public functions that load nothing, with values that are seldom expected."""
    check(world, path, QUICK_VALUES)


@pytest.mark.slow
@pytest.mark.parametrize("path", NAMES)
def test_any_wrong_argument_is_named(world: Calls, path: str) -> None:
    """Every parameter of every public function, with values of every kind."""
    check(world, path, VALUES)


def kinds_of(path: str) -> dict[str, Any]:
    """Return the kinds of a public function's parameters; none of a property."""
    one = public_callables()[path]
    found = {} if isinstance(one, property) else inspect.signature(one).parameters
    return {name: parameter.kind for name, parameter in found.items() if name != "self"}


def keywords_of(path: str) -> set[str]:
    """Return the parameters of a public function that are given as keywords alone."""
    return {name for name, kind in kinds_of(path).items() if kind is inspect.Parameter.KEYWORD_ONLY}


def options_of() -> dict[str, Set[str]]:
    """Return what each function takes as ``**options`` or ``**settings``, as its documentation says."""
    sampling = {field.name for field in dataclasses.fields(overspill.SamplingOptions)}
    stream = (keywords_of("Model.stream") - {"experts", "form"}) | sampling
    chat = (keywords_of("Model.chat") | stream) - {"reuse", "special"}
    flags = "n_ctx n_batch n_ubatch n_threads type_k type_v flash_attention load_mode rpc"
    return {
        "Cascade": keywords_of("Model"),
        "Cascade.chat": chat,
        "Cascade.stream": stream,
        **dict.fromkeys(("Chat", "Chat.ask", "Chat.load", "Chat.retry", "Chat.send", "Model.chat"), chat),
        **dict.fromkeys(("Model.aask", "Model.achat", "Model.ask"), chat),
        **dict.fromkeys(("Model.astream", "Model.generate"), stream),
        **dict.fromkeys(("Model.generate_many", "Model.stream", "Sampler"), sampling),
        **dict.fromkeys(("Placement.server_flags", "Plan.server_flags"), frozenset(flags.split())),
        "Llama": keywords_of("Model"),
        "Llama.create_chat_completion_openai_v1": kinds_of("Llama.create_chat_completion").keys() - {"messages"},
        "compare": stream & chat,
        "trace_experts": sampling,
        "ubatch_trade": keywords_of("plan") - {"n_ubatch"},
    }


@pytest.mark.parametrize("path", NAMES)
def test_each_takes_its_own_keywords(world: Calls, path: str) -> None:
    """Each parameter of every other function is refused by its name, before anything is done; its own are known."""
    one = public_callables()[path]
    if isinstance(one, property):
        return
    call, given = world[path]
    own = {name for name, kind in kinds_of(path).items() if kind is not inspect.Parameter.VAR_KEYWORD}
    options = options_of().get(path, set())
    assert bool(options) == (inspect.Parameter.VAR_KEYWORD in kinds_of(path).values())
    every = {name for other in NAMES for name in kinds_of(other)} | set().union(*options_of().values())
    wrong = []
    for name in sorted(every):
        is_own = name in own | options
        if is_own and path in LOADS:
            continue
        try:
            use(call(**given | {name: None}))
        except (TypeError, ValueError, Error) as error:
            said = str(error)
        else:
            said = ""
        is_refused = re.search(rf"(no option|unexpected keyword argument) '{name}'|^{name} is none of", said)
        if bool(is_refused) == is_own:
            wrong.append(f"{name}: {said:.200}")
    assert not wrong, "\n" + "\n".join(wrong)


def test_what_cannot_generate_says_so(vocab_path: Path) -> None:
    """However it is asked to."""
    with Model(vocab_path, vocab_only=True) as model:
        for call in (
            lambda: model.stream("Hello"),
            lambda: model.eval([1]),
            lambda: model.generate_many(["Hello"]),
            lambda: model.generate_many([]),
        ):
            with pytest.raises(Error, match="was loaded with vocab_only"):
                call()
