"""``memory`` and ``expert_cache``: devices that there are not and bad sizes are refused wherever one can give them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest

import overspill
from overspill import Cascade, Hardware, Model

OPTIONS: dict[str, Any] = {"n_ctx": 64, "n_threads": 1}
CALLS: dict[str, Callable[[Path, Any], Any]] = {
    "Model": lambda path, memory: Model(path, memory=memory, **OPTIONS),
    "Model on the CPU": lambda path, memory: Model(path, offload="cpu", memory=memory, **OPTIONS),
    "Model of some layers": lambda path, memory: Model(path, offload=3, memory=memory, **OPTIONS),
    "Model's vocabulary": lambda path, memory: Model(path, vocab_only=True, memory=memory),
    "Cascade": lambda path, memory: Cascade(path, path, memory=memory, offload="cpu", **OPTIONS),
    "Hardware.here": lambda path, memory: Hardware.here(memory=memory, measure=False),
    "bench": lambda path, memory: overspill.bench(path, memory=memory, n_prompt=1, n_gen=4, repetitions=1, n_threads=1),
    "compare": lambda path, memory: overspill.compare([path] * 2, ["x"], memory=memory, max_tokens=1, **OPTIONS),
    "tune": lambda path, memory: overspill.tune(path, memory=memory, n_ctx=64, seconds=0),
}
POOLS: dict[str, Callable[[Path, Any], Any]] = {
    "Model": lambda path, pools: Model(path, experts="cached", expert_cache=pools, **OPTIONS),
    "Model on the CPU": lambda path, pools: Model(path, offload="cpu", experts="cached", expert_cache=pools, **OPTIONS),
    "Model's vocabulary": lambda path, pools: Model(path, vocab_only=True, experts="cached", expert_cache=pools),
    "Cascade": lambda path, pools: Cascade(path, path, offload="cpu", experts="cached", expert_cache=pools, **OPTIONS),
}
BAD: list[tuple[Any, str]] = [
    ({"banana": "20GiB"}, ": there is no device 'banana' here, only .*CPU"),
    ({"cpu ": "20GiB"}, ": there is no device 'cpu ' here, only .*CPU"),
    ({"": "20GiB"}, ": there is no device '' here, only .*CPU"),
    ({"gpu": "20 bananas"}, r"\['gpu'\] must have a unit"),
    ({"gpu": -1}, r"\['gpu'\] must be 0 to 2\*\*50 bytes"),
    ({"gpu": "-1GiB"}, r"\['gpu'\] must be 0 to 2\*\*50 bytes"),
    ({"gpu": float("nan")}, r"\['gpu'\] must be bytes"),
    ({"gpu": "nan"}, r"\['gpu'\] must be a size"),
    ({"gpu": None}, r"\['gpu'\] must be bytes"),
    ("20GiB", " must be a mapping"),
    ({0: "20GiB"}, " must be a mapping"),
]


def test_the_calls_are_all_that_there_are() -> None:
    """A new function with such an argument is looked at here as well."""
    public = {name: getattr(overspill, name) for name in overspill.__all__}
    functions = {name: vars(one).get("__init__") if isinstance(one, type) else one for name, one in public.items()}
    for name, one in public.items():
        methods = inspect.getmembers(one, inspect.isroutine) if isinstance(one, type) else []
        functions |= {f"{name}.{method}": function for method, function in methods if not method.startswith("_")}
        if is_dataclass(one):  # its fields are no arguments of a caller
            del functions[name]
    through_model = {"memory": (), "expert_cache": ("Cascade",)}  # which takes any keyword of it
    for argument, calls in (("memory", CALLS), ("expert_cache", POOLS)):
        found = {name for name, one in functions.items() if argument in parameters_of(one)}
        assert found == {name.split(" ")[0].removesuffix("'s") for name in calls} - {*through_model[argument]}


def parameters_of(function: Any) -> Collection[str]:
    """Return the names of a function's parameters; none of native code."""
    is_python = inspect.isfunction(function) or inspect.ismethod(function)
    return inspect.signature(function).parameters if is_python else ()


@pytest.mark.parametrize(
    ("argument", "call"), [*(("memory", name) for name in CALLS), *(("expert_cache", name) for name in POOLS)]
)
def test_bad_ones_are_refused(tiny_gpt_oss_path: Path, argument: str, call: str) -> None:
    """Whether there is a GPU or not, and whether it would be used or not."""
    calls = CALLS if argument == "memory" else POOLS
    for given, words in BAD:
        with pytest.raises((ValueError, TypeError), match=f"^{argument}{words}"):
            calls[call](tiny_gpt_oss_path, given)


def test_a_limit_for_a_gpu_that_is_not_there(tiny_gpt_oss_path: Path, no_gpu: None) -> None:
    """Has no effect, so that a script runs with a GPU and without; a name of one there must be."""
    for name, call in CALLS.items():
        if name not in ("bench", "compare", "tune"):  # which load and measure a model in the same way
            done = call(tiny_gpt_oss_path, {"gpu": "1GiB", "cpu": "64GiB"})
            getattr(done, "close", lambda: None)()
        with pytest.raises(ValueError, match=r"^memory: there is no device 'CUDA7' here, only CPU$"):
            call(tiny_gpt_oss_path, {"CUDA7": "1GiB"})
    assert [one.name for one in Hardware.here(memory={"gpu": 1}, measure=False).devices] == ["CPU"]
    with pytest.raises(overspill.Error, match="needs a GPU"):
        POOLS["Model"](tiny_gpt_oss_path, {"gpu": "1GiB"})


def test_a_cache_of_experts_is_not_in_ram(tiny_gpt_oss_path: Path) -> None:
    """Where they all are anyway."""
    for call in POOLS.values():
        with pytest.raises(ValueError, match=r"^expert_cache must be on GPUs"):
            call(tiny_gpt_oss_path, {"CPU": "1GiB"})
