"""Build and run llama.cpp's own tools against the installed libraries; see ``upstream/CMakeLists.txt``."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model_files import llama_cpp_folder
from overspill import SamplingOptions, _core


class NoUpstreamToolsError(Exception):
    """They cannot be linked to the libraries of this build."""


def build_upstream_tools(cache: Path) -> Path:
    """Return a folder with llama.cpp's tools, samplers and fit, built once per version of the libraries.

    ``OVERSPILL_TEST_TOOLS`` is one that has been built elsewhere.
    """
    if given := os.environ.get("OVERSPILL_TEST_TOOLS"):
        return Path(given)
    libraries = Path(_core.__file__).parent / "lib"
    if sys.platform == "win32" or not list(libraries.glob("*ggml-cpu.*")):
        raise NoUpstreamToolsError(
            "upstream's tools are linked to libggml-cpu, which plugin builds and Windows do not allow"
        )
    project = Path(__file__).parent.parent / "upstream"
    version = hashlib.sha256(str(libraries).encode())
    for file in (*sorted(project.iterdir()), *sorted(libraries.iterdir())):
        version.update(file.read_bytes())
    # In the checkout, like every build, so that ccache finds the paths alike in the next one.
    build = cache / version.hexdigest()[:12]
    if not (build / "done").is_file():
        shutil.rmtree(build, ignore_errors=True)
        configure = ["cmake", "-S", str(project), "-B", str(build), "-G", "Ninja"]
        configure += [f"-DOVERSPILL_LLAMA_CPP_DIR={llama_cpp_folder()}", f"-DOVERSPILL_LIBRARIES={libraries}"]
        for command in (configure, ["cmake", "--build", str(build)]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout[-3000:]}"
        (build / "done").touch()
    return build


def completion(tools: Path, model: Path, prompt: str, n: int) -> str:
    """Return llama-completion's greedy continuation of ``prompt``."""
    command = [str(tools / "llama-completion"), "--model", str(model), "--prompt", prompt, "--no-escape"]
    command += ["--predict", str(n), "--temp", "0", "--threads", "2", "--ctx-size", "1024"]
    command += ["--no-display-prompt", "--no-conversation", "--no-warmup"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=300, check=True)
    text = done.stdout.decode(errors="replace")
    # What it prints after the text, depending on how it ended.
    for end in (" [end of text]\n\n\n", "\n\n"):
        if text.endswith(end):
            return text.removesuffix(end)
    raise AssertionError(f"llama-completion ended in an unknown way: {text!r}")


def decode_rate(tools: Path, model: Path, n: int, n_threads: int) -> float:
    """Return the decode speed that llama-bench measures, in tokens per second."""
    command = [str(tools / "llama-bench"), "--model", str(model), "--n-prompt", "0", "--n-gen", str(n)]
    command += ["--threads", str(n_threads), "--repetitions", "1", "--output", "json"]
    done = subprocess.run(command, capture_output=True, timeout=300, check=True, env={**os.environ})
    return float(json.loads(done.stdout)[0]["avg_ts"])


class MinimalLoop:
    """The least that a decode loop in C++ can be, in this process and with its own copy of the model.

    ``overrides`` are pairs of a tensor pattern and the name of a device, as llama.cpp's ``--override-tensor``.
    """

    def __init__(
        self,
        tools: Path,
        model: Path,
        *,
        n_ctx: int,
        n_threads: int,
        n_gpu_layers: int = 0,
        overrides: Sequence[tuple[str, str]] = (),
    ) -> None:
        (library,) = tools.glob("*upstream_minimal_loop.*")
        self._library = ctypes.CDLL(str(library))
        self._library.minimal_loop_open.restype = ctypes.c_void_p
        self._library.minimal_loop_run.restype = ctypes.c_bool
        patterns, names = ([pair[i].encode() for pair in overrides] for i in (0, 1))
        self._loop = ctypes.c_void_p(
            self._library.minimal_loop_open(
                str(model).encode(),
                ctypes.c_uint32(n_ctx),
                ctypes.c_int32(n_threads),
                ctypes.c_int32(n_gpu_layers),
                (ctypes.c_char_p * len(patterns))(*patterns),
                (ctypes.c_char_p * len(names))(*names),
                ctypes.c_size_t(len(patterns)),
            )
        )
        assert self._loop, "the model does not load"

    def greedy(self, prompt: Sequence[int], n: int) -> list[int]:
        """Return the ``n`` most likely tokens after a prompt."""
        tokens = np.zeros(n, np.int32)
        self._run(prompt, tokens, greedy=True)
        return [int(token) for token in tokens]

    def seconds(self, prompt: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float64]:
        """Return the time of the prompt, and of each of the tokens but the last, decoded without a look at logits."""
        return self._run(prompt, np.array(tokens, np.int32), greedy=False)

    def _run(self, prompt: Sequence[int], tokens: NDArray[np.int32], *, greedy: bool) -> NDArray[np.float64]:
        given = np.array(prompt, np.int32)
        seconds = np.zeros(len(tokens))
        done = self._library.minimal_loop_run(
            self._loop,
            given.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int32(len(given)),
            ctypes.c_int32(len(tokens)),
            ctypes.c_bool(greedy),
            tokens.ctypes.data_as(ctypes.c_void_p),
            seconds.ctypes.data_as(ctypes.c_void_p),
        )
        assert done, "llama_decode failed"
        return seconds

    def close(self) -> None:
        """Free the model."""
        self._library.minimal_loop_close(self._loop)
        self._loop = ctypes.c_void_p()


_OPTIONS = [
    (field.name, ctypes.c_int32 if field.type == "int" else ctypes.c_float)
    for field in fields(SamplingOptions)
    if field.name not in ("dry_sequence_breakers", "logit_bias", "seed")
]


class _Options(ctypes.Structure):
    _fields_ = (*_OPTIONS, ("seed", ctypes.c_uint32))


class _LogitBias(ctypes.Structure):
    _fields_ = [("token", ctypes.c_int32), ("bias", ctypes.c_float)]


class UpstreamChain:
    """llama.cpp's samplers, chained as its tools do, with our names for the options."""

    def __init__(self, tools: Path, options: SamplingOptions, n_vocab: int, vocabulary: Path | None = None) -> None:
        (library,) = tools.glob("*upstream_sampling.*")
        self._library = ctypes.CDLL(str(library))
        for name, result in (("chain", ctypes.c_void_p), ("vocabulary", ctypes.c_void_p), ("sample", ctypes.c_size_t)):
            getattr(self._library, f"upstream_{name}").restype = result
        self._library.upstream_time.restype = ctypes.c_double
        values = _Options(**{name: getattr(options, name) for name, _ in _OPTIONS})
        values.seed = options.seed or 0
        if values.repeat_last_n < 0:
            values.repeat_last_n = 1 << 16
        if values.dry_last_n < 0:
            values.dry_last_n = 1 << 16
        bias = (_LogitBias * len(options.logit_bias))(*(_LogitBias(*pair) for pair in options.logit_bias.items()))
        breakers = [text.encode() for text in options.dry_sequence_breakers]
        model = None if vocabulary is None else _vocabulary(self._library, str(vocabulary))
        self._chain = ctypes.c_void_p(
            self._library.upstream_chain(
                ctypes.byref(values),
                ctypes.c_int32(n_vocab),
                bias,
                ctypes.c_int32(len(bias)),
                ctypes.c_void_p(model),
                (ctypes.c_char_p * len(breakers))(*breakers),
                ctypes.c_size_t(len(breakers)),
            )
        )

    def accept(self, token: int) -> None:
        """Tell the penalties and DRY of a token."""
        self._library.upstream_accept(self._chain, ctypes.c_int32(token))

    def sample(self, logits: NDArray[np.float32]) -> tuple[NDArray[np.int32], NDArray[np.float32], int]:
        """Return the ids that are left, their probabilities, and the token chosen."""
        ids = np.empty(len(logits), np.int32)
        probabilities = np.empty(len(logits), np.float32)
        chosen = ctypes.c_int32()
        n = self._library.upstream_sample(
            self._chain,
            logits.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_size_t(len(logits)),
            ids.ctypes.data_as(ctypes.c_void_p),
            probabilities.ctypes.data_as(ctypes.c_void_p),
            ctypes.byref(chosen),
        )
        return ids[:n], probabilities[:n], chosen.value

    def time_us(self, logits: NDArray[np.float32], repeats: int) -> float:
        """Return the median time of a draw in microseconds, measured without Python."""
        address = logits.ctypes.data_as(ctypes.c_void_p)
        return float(self._library.upstream_time(self._chain, address, ctypes.c_size_t(len(logits)), repeats))

    def __del__(self) -> None:
        self._library.upstream_free(self._chain)


@cache
def _vocabulary(library: ctypes.CDLL, path: str) -> int:
    model: int = library.upstream_vocabulary(path.encode())
    return model


@dataclass(frozen=True)
class DryRunSettings:
    """What decides the size of a context; by default what overspill asks for."""

    n_ctx: int = 8192  # 0: as large as fits
    n_batch: int = 512
    n_ubatch: int = 512
    n_outputs_max: int = 1
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attention: str = "auto"
    op_offload: bool = True


@dataclass(frozen=True)
class DryRunPlacement:
    """What llama.cpp takes: layers in the order of the devices, and a device for what a pattern is found in."""

    devices: list[str]
    n_gpu_layers: int
    tensor_split: list[int]
    overrides: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class DryRunMemory:
    """What llama.cpp would allocate on a device."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes


@dataclass(frozen=True)
class DryRun:
    """What llama.cpp says when it loads without allocating. All that is on the host counts as the CPU's."""

    memory: dict[str, DryRunMemory]
    layers: list[str]  # the device of each layer and its KV cache, the output head's last
    n_splits: int  # in decoding
    n_ctx: int


@dataclass(frozen=True)
class Fit:
    """What llama.cpp's fit has chosen, and how long it took."""

    success: bool
    placement: DryRunPlacement
    dry_run: DryRun
    seconds: float


def upstream_fit(
    tools: Path,
    model: Path,
    memory_bytes: Mapping[str, int],
    settings: DryRunSettings | None = None,
    *,
    margin_bytes: int = 1 << 30,
    n_ctx_min: int = 4096,
) -> Fit:
    """Ask llama.cpp's fit for a placement on GPUs of such names and sizes that need not be there."""
    options = {"margin_bytes": margin_bytes, "n_ctx_min": n_ctx_min}
    answer = _ask(tools, model, memory_bytes, settings, fit=options)
    placement = answer["placement"]
    placement["overrides"] = [(pattern, device) for pattern, device in placement["overrides"]]
    return Fit(answer["success"], DryRunPlacement(**placement), _dry_run(answer), answer["seconds"])


def upstream_dry_run(
    tools: Path,
    model: Path,
    memory_bytes: Mapping[str, int],
    placement: DryRunPlacement,
    settings: DryRunSettings | None = None,
) -> DryRun:
    """Load a model without allocating anything, on GPUs of such names and sizes that need not be there."""
    return _dry_run(_ask(tools, model, memory_bytes, settings, placement=asdict(placement)))


def _ask(
    tools: Path, model: Path, memory_bytes: Mapping[str, int], settings: DryRunSettings | None, **what: Any
) -> dict[str, Any]:
    devices = [{"name": name, "memory_bytes": size} for name, size in memory_bytes.items()]
    request = {"model": str(model), "devices": devices, "settings": asdict(settings or DryRunSettings()), **what}
    command = [str(tools / "upstream-fit")]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"upstream-fit ended with {done.returncode}:\n{done.stderr[-2000:]}"
    answer: dict[str, Any] = json.loads(done.stdout)
    assert "error" not in answer, answer["error"]
    return answer


def _dry_run(answer: dict[str, Any]) -> DryRun:
    memory = {device: DryRunMemory(**parts) for device, parts in answer["memory"].items()}
    return DryRun(memory, answer["layers"], answer["n_splits"], answer["n_ctx"])


class _StandInOptions(ctypes.Structure):
    _fields_ = (
        ("memory_bytes", ctypes.c_uint64),
        ("refuse_bytes", ctypes.c_uint64),
        ("link_bytes_per_s", ctypes.c_double),
        ("latency_s", ctypes.c_double),
        ("n_threads", ctypes.c_int32),
        ("offload_min_batch", ctypes.c_int32),
        ("pinned_bytes_per_s", ctypes.c_double),
        ("register_limit_bytes", ctypes.c_uint64),
        ("register_bytes_per_s", ctypes.c_double),
        ("computes_as_host", ctypes.c_int32),
        ("expert_bytes_per_s", ctypes.c_double),
    )


class StandInCounts(ctypes.Structure):
    """What was done to all stand-in GPUs of this process."""

    to_device_bytes: int
    n_copies: int
    n_partly_copies: int
    registered_bytes: int
    _fields_ = [
        ("to_device_bytes", ctypes.c_uint64),
        ("n_copies", ctypes.c_uint64),
        ("n_partly_copies", ctypes.c_uint64),
        ("registered_bytes", ctypes.c_uint64),
    ]


def stand_in_counts(tools: Path) -> StandInCounts:
    """Return the counts of this process.

    Partly copies are those whose host side was registered with the driver in part: CUDA refuses these.
    """
    (library,) = tools.glob("*stand_in_gpu.*")
    ask = ctypes.CDLL(str(library)).stand_in_counts
    ask.restype = StandInCounts
    counts: StandInCounts = ask()
    return counts


def stand_in_gpu(
    tools: Path,
    name: str,
    memory_bytes: int,
    *,
    refuse_bytes: int = 0,
    link_bytes_per_s: float = 0,
    latency_s: float = 0,
    n_threads: int = 1,
    offload_min_batch: int = 32,
    pinned_bytes_per_s: float = 0,
    register_limit_bytes: int = 0,
    register_bytes_per_s: float = 0,
    computes_as_host: bool = False,
    expert_bytes_per_s: float = 0,
) -> None:
    """Give this process a GPU that computes on the CPU, for good; called again, it changes.

    It gives out ``refuse_bytes``, where that is not 0, instead of the memory that it claims to have. Each transfer
    takes ``latency_s`` and the time on its link, each piece of a graph ``latency_s``. Copies from and to host memory
    that it knows, as CUDA does pinned and registered memory, go at ``pinned_bytes_per_s`` if that is not 0. Of the
    memory that it is given to register, it takes ``register_limit_bytes`` at most (0: any), at ``register_bytes_per_s``
    (0: at once), and nothing at all without ``GGML_CUDA_REGISTER_HOST`` in the environment.

    With ``computes_as_host`` it has the CPU's own products for the weights in its memory, to the last bit. With
    ``expert_bytes_per_s`` it does not compute the experts of a few tokens, whose results are zeros: the time passes
    that reading them takes, beside what the CPU does, and so it does for copies of weights. That is for speed alone.
    """
    (library,) = tools.glob("*stand_in_gpu.*")
    options = _StandInOptions(
        memory_bytes,
        refuse_bytes,
        link_bytes_per_s,
        latency_s,
        n_threads,
        offload_min_batch,
        pinned_bytes_per_s,
        register_limit_bytes,
        register_bytes_per_s,
        computes_as_host,
        expert_bytes_per_s,
    )
    ctypes.CDLL(str(library)).stand_in_gpu(name.encode(), ctypes.byref(options))
