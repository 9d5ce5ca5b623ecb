"""Weights in RAM that are registered with a GPU's driver while the model is in use.

The GPU is a stand-in, which does not come and go: each test has a process of its own.
"""

from __future__ import annotations

from pathlib import Path

import overspill
from overspill import _core
from programs import in_process

BEGINNING = """
import json, os, sys, time
from pathlib import Path
import overspill
from overspill import _core
from upstream_tools import stand_in_counts, stand_in_gpu

path, tools = sys.argv[1].encode(), Path(sys.argv[2])

def load(pin_weights=True, gpu=True, overrides=(("blk.[02].ffn_.*_exps", "CPU"),), **others):
    options = _core.ModelOptions()
    options.n_ctx = 512
    options.pin_weights = pin_weights
    if gpu:
        options.placement.devices = ["GPU0"]
        options.placement.n_gpu_layers = -1
        options.placement.overrides = list(overrides)
    for name, value in others.items():
        setattr(options, name, value)
    return _core.Model(path, options, None)

def reply(model, n_prompt=100):
    options = _core.GenerationOptions()
    options.sampler = overspill.Sampler(temperature=0)._core
    options.max_tokens = 8
    return [token.id for token in model.open_stream(list(range(1, n_prompt + 1)), options)]

def state(model):
    pinned = model.pinned()
    return [pinned.registered_bytes, pinned.wanted_bytes, pinned.finished, pinned.reason]

def finished(model):
    while not model.pinned().finished:
        time.sleep(0.001)
    return state(model)

def end(result):
    print(json.dumps(result), flush=True)
    os._exit(0)
"""

ALL = """
stand_in_gpu(tools, "GPU0", 1 << 30, register_bytes_per_s=2e6)
expected = reply(load(pin_weights=False))
assert stand_in_counts(tools).registered_bytes == 0
model = load()
before = state(model)
replies = []
while not model.pinned().finished:
    replies.append(reply(model))
n_during = len(replies)
replies.append(reply(model))
after, counts = state(model), stand_in_counts(tools)
in_ram = sum(one.n_bytes for one in model.memory().tensors if one.device == "CPU" and "embd" not in one.name)
model.close()
end({
    "before": before, "after": after, "n_during": n_during, "same": all(one == expected for one in replies),
    "in_ram": in_ram, "registered": counts.registered_bytes, "partly": counts.n_partly_copies,
    "left": stand_in_counts(tools).registered_bytes, "closed": state(model)
})
"""


def test_all_that_a_gpu_takes_over_is_registered(tiny_gpt_oss_path: Path, upstream_tools: Path) -> None:
    """In the background, in whole pages and without the embedding; replies stay the same, and no copy is cut in two."""
    found = in_process(BEGINNING + ALL, str(tiny_gpt_oss_path), str(upstream_tools))
    assert found["before"][:1] + found["before"][2:] == [0, False, ""]
    wanted = found["before"][1]
    assert found["in_ram"] <= wanted < found["in_ram"] + (1 << 20)
    assert found["after"] == [wanted, wanted, True, ""]
    assert found["registered"] == wanted
    assert found["n_during"] > 0
    assert found["same"]
    assert found["partly"] == 0
    assert found["left"] == 0
    assert found["closed"] == [0, wanted, True, ""]


REFUSED = """
stand_in_gpu(tools, "GPU0", 1 << 30, register_limit_bytes=1_000_000)
expected = reply(load(pin_weights=False))
results = []
for limit in (1_000_000, 1000):
    stand_in_gpu(tools, "GPU0", 1 << 30, register_limit_bytes=limit)
    model = load()
    after = finished(model)
    assert reply(model) == expected
    counts = stand_in_counts(tools)
    model.close()
    results.append([*after, counts.registered_bytes, counts.n_partly_copies, stand_in_counts(tools).registered_bytes])
end(results)
"""


def test_a_driver_that_refuses(tiny_gpt_oss_path: Path, upstream_tools: Path) -> None:
    """What it took stays registered, its reason is kept, and the model works."""
    some, none = in_process(BEGINNING + REFUSED, str(tiny_gpt_oss_path), str(upstream_tools))
    for registered, wanted, is_finished, reason, counted, n_partly, left in (some, none):
        assert registered == counted < wanted
        assert is_finished
        assert reason.startswith("failed to register 0.8")
        assert "MiB of pinned memory: out of memory" in reason
        assert (n_partly, left) == (0, 0)
    assert some[0] > 0 == none[0]


MANY = """
stand_in_gpu(tools, "GPU0", 1 << 30, register_bytes_per_s=3e7)
expected = reply(load(pin_weights=False))
wrong = 0
for i in range(20):
    model = load()
    if i % 4 == 1:
        wrong += reply(model, 100) != expected
    if i % 4 == 2:
        finished(model)
    if i % 4 == 3:
        del model  # in place of close()
    else:
        model.close()
    wrong += stand_in_counts(tools).registered_bytes != 0
end([wrong, stand_in_counts(tools).n_partly_copies])
"""


def test_loading_and_closing_again_and_again(tiny_gpt_oss_path: Path, upstream_tools: Path) -> None:
    """At any moment of it, nothing stays registered."""
    assert in_process(BEGINNING + MANY, str(tiny_gpt_oss_path), str(upstream_tools)) == [0, 0]


NOTHING = """
stand_in_gpu(tools, "GPU0", 1 << 30)
end([
    finished(load(gpu=False)),
    finished(load(overrides=())),
    finished(load(load_mode=_core.LoadMode.read)),
    finished(load(pin_weights=False)),
    {device.name: device.registers_host_memory for device in overspill.devices()},
])
"""


def test_where_there_is_nothing_to_register(tiny_gpt_oss_path: Path, upstream_tools: Path) -> None:
    """Without a GPU it says so; with nothing in RAM but the embedding, or nothing that is mapped, all is well."""
    without_gpu, all_there, not_mapped, not_asked, devices = in_process(
        BEGINNING + NOTHING, str(tiny_gpt_oss_path), str(upstream_tools)
    )
    assert without_gpu == [0, 0, True, "no GPU holds a part of the model"]
    assert all_there == not_mapped == not_asked == [0, 0, True, ""]
    assert devices == {"GPU0": True, "CPU": False}


def test_a_model_on_the_cpu_has_nothing_registered(tiny_gpt_oss: overspill.Model) -> None:
    """And the core makes such a state alone."""
    pinned = tiny_gpt_oss._core.pinned()
    assert isinstance(pinned, _core.PinnedMemory)
    assert (pinned.registered_bytes, pinned.wanted_bytes, pinned.finished, pinned.reason) == (0, 0, True, "")
