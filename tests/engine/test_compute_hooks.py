"""Prompts on a GPU that copies weights from RAM: ended in the middle of a batch, taken over from a size of the model's.

The GPU is a stand-in, which does not come and go: each test has a process of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from overspill import _core
from programs import in_process

BEGINNING = """
import json, os, signal, sys, threading, time
from pathlib import Path
import overspill
from overspill import _core
from upstream_tools import stand_in_counts, stand_in_gpu

path, tools = sys.argv[1].encode(), Path(sys.argv[2])

def load(offload_min_batch=0, n_parallel=1, n_ctx=512):
    options = _core.ModelOptions()
    options.n_ctx = n_ctx
    options.n_parallel = n_parallel
    options.offload_min_batch = offload_min_batch
    options.placement.devices = ["GPU0"]
    options.placement.n_gpu_layers = -1
    # Biases go by their rows, tokens times experts, and would be taken over by themselves.
    options.placement.overrides = [("ffn_.*_exps.weight", "CPU")]
    return _core.Model(path, options, None)

def stream(model, n_prompt):
    options = _core.GenerationOptions()
    options.sampler = overspill.Sampler(temperature=0)._core
    options.max_tokens = 8
    return model.open_stream(list(range(1, n_prompt + 1)), options)

def copied_bytes():
    return stand_in_counts(tools).to_device_bytes

def reply(model, n_prompt):
    before = copied_bytes()
    tokens = [token.id for token in stream(model, n_prompt)]
    return tokens, copied_bytes() - before

def end(result):
    print(json.dumps(result), flush=True)
    os._exit(0)
"""

INTERRUPTED = """
stand_in_gpu(tools, "GPU0", 1 << 30)
model = load()
expected, n_bytes = reply(model, 100)
n_weights = sum(one.n_bytes for one in model.memory().tensors if one.name.endswith("exps.weight"))

def ended_by(end_it):
    # The whole batch would take half a minute.
    stand_in_gpu(tools, "GPU0", 1 << 30, link_bytes_per_s=n_bytes / 30)
    before = copied_bytes()
    one = stream(model, 100)
    def watch():
        while copied_bytes() - before < n_bytes / 20:
            time.sleep(0.01)
        end_it(one)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        tokens = len(list(one))
    except KeyboardInterrupt:
        tokens = "interrupted"
    watcher.join()
    stand_in_gpu(tools, "GPU0", 1 << 30)
    return [tokens, one.stats().stop_reason.name, (copied_bytes() - before) / n_bytes, reply(model, 100)[0] == expected]

end([
    n_weights / n_bytes,
    ended_by(lambda one: one.close(_core.StopReason.closed)),
    ended_by(lambda one: os.kill(os.getpid(), signal.SIGINT)),
])
"""


@pytest.mark.usefixtures("heeds_interrupts")
def test_a_prompt_is_ended_in_the_middle_of_a_batch(tiny_gpt_oss_path: Path, upstream_tools: Path) -> None:
    """By close() and by a signal, long before the weights of all layers were copied; then the model works as before."""
    weights, closed, interrupted = in_process(BEGINNING + INTERRUPTED, str(tiny_gpt_oss_path), str(upstream_tools))
    assert weights > 0.8  # nearly all that is copied is taken over
    assert (closed[:2], interrupted[:2]) == ([0, "closed"], ["interrupted", "interrupted"])
    for _, _, share_copied, same_afterwards in (closed, interrupted):
        assert 0.05 <= share_copied < 0.4
        assert same_afterwards


TAKEN_OVER = """
stand_in_gpu(tools, "GPU0", 1 << 30, offload_min_batch=32)
models = {n: load(n) for n in (0, 8, 64, 65536)}
results = []
for n_prompt in (4, 16, 40, 100):
    found = {n: reply(model, n_prompt) for n, model in models.items()}
    # What is copied is either hidden states or weights.
    n_bytes = {n: copied for n, (_, copied) in found.items()}
    taken = [n for n in models if n_bytes[n] != n_bytes[65536]]
    assert len({n_bytes[n] for n in taken}) <= 1
    results.append([n_prompt, taken, len({tuple(tokens) for tokens, _ in found.values()})])
end(results)
"""


def test_each_model_has_its_own_batch_that_is_taken_over(tiny_gpt_oss_path: Path, upstream_tools: Path) -> None:
    """As the backend has it unless it is said, with the models used in turn; the tokens are the same."""
    assert in_process(BEGINNING + TAKEN_OVER, str(tiny_gpt_oss_path), str(upstream_tools)) == [
        [4, [], 1],
        [16, [8], 1],
        [40, [0, 8], 1],
        [100, [0, 8, 64], 1],
    ]


@pytest.mark.parametrize("n", [-1, 65537])
def test_no_such_batch(tiny_gpt_oss_path: Path, n: int) -> None:
    """Refused before anything is loaded."""
    options = _core.ModelOptions()
    options.offload_min_batch = n
    with pytest.raises(ValueError, match=f"offload_min_batch must be 0 to 65536, not {n}"):
        _core.Model(str(tiny_gpt_oss_path).encode(), options, None)


REPORTED = """
stand_in_gpu(tools, "GPU0", 1 << 30, offload_min_batch=32)
models = [load(n_parallel=n, n_ctx=64) for n in (1, 40)]
end([sorted((one.name, one.device, one.n_bytes) for one in model.memory().tensors) for model in models])
"""


def test_memory_of_many_places_names_no_copies(tiny_gpt_oss_path: Path, upstream_tools: Path) -> None:
    """A step of forty streams is a batch that a GPU takes over: the weights that are reported are those in RAM."""
    one, forty = in_process(BEGINNING + REPORTED, str(tiny_gpt_oss_path), str(upstream_tools))
    assert {device for _, device, _ in one} == {"CPU", "GPU0"}
    assert forty == one
