"""Traces of a mixture's experts: which ones each layer used for each token."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from overspill._core import UNKNOWN_EXPERT, CachePolicy, Error, expert_reuse_distances, replay_experts
from overspill.base.checks import as_integer, as_path, as_real, as_text, check_choice, shown
from overspill.base.text import short_repr
from overspill.base.units import format_count

__all__ = ["POLICIES", "ExpertReplay", "ExpertTrace", "Policy", "TracedTokens"]

Policy: TypeAlias = Literal["lru", "lru-one-insertion", "lru-shared", "second-touch", "lfu", "fixed", "belady"]
"""What decides which experts of a layer are resident:

======================  ==================================================================================
``lru``                 the least recently used leaves
``lru-one-insertion``   the same; of a layer's misses of a token only the first is inserted
``lru-shared``          the same in one cache for all layers, as large as theirs together
``second-touch``        LRU; a miss is inserted only if one of the two tokens before used the expert as well
``lfu``                 the least frequently used leaves; a use counts for 0.99 as much with each token
``fixed``               the most frequent of the first half of the tokens stay; replayed is the second half
``belady``              the one whose next use is farthest away leaves: the most hits that are possible
======================  ==================================================================================
"""
TracedTokens: TypeAlias = Literal["decoded", "prompt", "all"]
"""Tokens of a trace: those that were decoded one by one, those of prompts, or both in the order of the requests."""

POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclass(frozen=True, slots=True)
class ExpertReplay:
    """What a cache of experts would have answered; :meth:`ExpertTrace.replay` returns it."""

    policy: Policy
    resident: int
    """Experts of each layer that the cache holds."""
    n_experts: int
    """Experts of each layer."""
    tokens: int
    """Tokens that were replayed."""
    requests_by_layer: tuple[int, ...]
    """Experts that each layer asked for."""
    hits_by_layer: tuple[int, ...]
    """Those of them that were resident."""
    insertions_by_layer: tuple[int, ...]
    """Misses that were copied into the cache, and stayed for the next token."""

    def __repr__(self) -> str:
        """Return policy, size and hits in brackets."""
        return short_repr(
            self, f"{self.policy}: {self.resident} of {self.n_experts} experts resident, {self.hit_share:.1%} hits"
        )

    @property
    def resident_share(self) -> float:
        """``resident / n_experts``."""
        return self.resident / self.n_experts

    @property
    def requests(self) -> int:
        """Experts that all layers asked for."""
        return sum(self.requests_by_layer)

    @property
    def hits(self) -> int:
        """Those of them that were resident."""
        return sum(self.hits_by_layer)

    @property
    def hit_share(self) -> float:
        """``hits / requests``; the first use of an expert is a miss. 0 if nothing was asked for."""
        return self.hits / max(1, self.requests)

    @property
    def insertions_per_token(self) -> float:
        """Experts copied into the caches of all layers for a token."""
        return sum(self.insertions_by_layer) / max(1, self.tokens)


@dataclass(frozen=True, eq=False)
class ExpertTrace:
    """Which experts each layer used, token by token; no text is in it.

    :func:`trace_experts` records one, :meth:`load` reads one.
    """

    requests: tuple[NDArray[np.uint16], ...]
    """Of each request, the experts of shape (tokens, layers, experts of a token), dtype uint16, read-only.

    They are in the router's order, the most probable first. 65535 stands where it is not known which expert was used:
    in the last layer llama.cpp computes only those tokens of a prompt whose logits are asked for.
    """
    n_prompt: tuple[int, ...]
    """Of each request, how many tokens from the first on are the prompt's."""
    n_experts: int
    """Experts of each layer."""
    layers: tuple[int, ...]
    """The numbers of the layers with experts."""
    model: str
    """The model's name."""

    def __post_init__(self) -> None:
        """Check it, and make the arrays read-only."""
        as_integer("n_experts", self.n_experts, 1, UNKNOWN_EXPERT)
        as_text("model", self.model)
        shapes, views = set(), []
        for request in self.requests:
            if not isinstance(request, np.ndarray) or request.dtype != np.uint16 or request.ndim != 3:
                raise TypeError(
                    f"requests must be uint16 arrays of shape (tokens, layers, experts), not {shown(request)}"
                )
            largest = int(request[request != UNKNOWN_EXPERT].max(initial=0))
            if largest >= self.n_experts:
                raise ValueError(f"requests must have experts under n_experts = {self.n_experts}, not {largest}")
            in_order = np.sort(request, axis=2)
            if ((in_order[:, :, 1:] == in_order[:, :, :-1]) & (in_order[:, :, 1:] != UNKNOWN_EXPERT)).any():
                raise ValueError("requests must not have an expert twice in a layer of a token")
            shapes.add(request.shape[1:])
            views.append(request.view())
            views[-1].flags.writeable = False
        object.__setattr__(self, "requests", tuple(views))
        if len(shapes) != 1 or 0 in next(iter(shapes)):
            raise ValueError("requests must be at least one, all with as many layers and experts of a token")
        if any(number < 0 for number in self.layers):
            raise ValueError("layers must be numbers from 0")
        if len(self.layers) != next(iter(shapes))[0]:
            raise ValueError(f"layers must be {next(iter(shapes))[0]} numbers, not {len(self.layers)}")
        if len(self.n_prompt) != len(self.requests) or any(
            not 0 <= n <= len(request) for n, request in zip(self.n_prompt, self.requests, strict=True)
        ):
            raise ValueError("n_prompt must have a number for each request, from 0 to its tokens")

    def __repr__(self) -> str:
        """Return the model, and the numbers of tokens, layers and experts, in brackets."""
        tokens, layers = sum(map(len, self.requests)), format_count(len(self.layers), "layer")
        return short_repr(
            self, f"of {self.model}: {format_count(tokens, 'token')}, {layers} of {self.n_experts} experts"
        )

    def __reduce__(self) -> tuple[type[ExpertTrace], tuple[Any, ...]]:
        """Return what pickle makes it of, checked and read-only again."""
        return type(self), (self.requests, self.n_prompt, self.n_experts, self.layers, self.model)

    # --- files

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, n_experts: int | None = None) -> ExpertTrace:
        """Return the trace in an ``.npz`` file: one that :meth:`save` wrote, or one of another tool.

        Parameters
        ----------
        path
            The file. Each array whose name begins with ``request`` is one, of shape (tokens, layers, experts of a
            token) and of any type of integers. In a file with an array ``n_experts``, the largest number of the type
            stands for what is unknown, unless it is the number of an expert.
        n_experts
            Experts of each layer, 1 to 65535. Default: what the file says in an array ``n_experts``, otherwise one more
            than the largest that was used.

        Raises
        ------
        Error
            The file is missing or cannot be read.
        ValueError
            It is no such file, or ``n_experts`` is too small.
        """
        path = as_path("path", path)
        if n_experts is not None:
            n_experts = as_integer("n_experts", n_experts, 1, UNKNOWN_EXPERT)
        arrays = _read_arrays(path)
        names = [name for name in arrays if name.startswith("request")]
        if not names:
            raise ValueError(f'{path} has no routes: its arrays must be named "request_000" and so on')
        try:
            said = int(arrays["n_experts"]) if "n_experts" in arrays else None
            requests = tuple(_as_routes(arrays[name], said) for name in names)
            if n_experts is None:
                n_experts = _largest(requests) + 1 if said is None else said
            n_prompt = arrays.get("n_prompt", np.zeros(len(requests), np.int64))
            layers = arrays.get("layers", np.arange(requests[0].shape[1]))
            for name, numbers in (("n_prompt", n_prompt), ("layers", layers)):
                if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
                    raise ValueError(f"{name} must be a list of integers")
            model = str(arrays["model"]) if "model" in arrays else Path(path).stem
            return cls(requests, tuple(map(int, n_prompt)), n_experts, tuple(map(int, layers)), model)
        except (TypeError, ValueError, OverflowError, MemoryError) as error:
            raise ValueError(f"{path} is no trace of experts: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace to an ``.npz`` file, with uint8 or uint16 arrays ``request_000`` and so on.

        The largest number of the type stands for 65535. There are also ``n_experts``, ``n_prompt``, ``layers`` and
        ``model``.

        Raises
        ------
        OSError
            The file cannot be written.
        ValueError
            Its name does not end in ``.npz``.
        """
        path = as_path("path", path)
        if Path(path).suffix != ".npz":
            raise ValueError(f"path must end in .npz, not {shown(str(path))}")
        kind: type[np.unsignedinteger[Any]] = np.uint8 if self.n_experts < 256 else np.uint16
        arrays: dict[str, Any] = {
            # The cast keeps the low bits: what is unknown becomes the type's largest number.
            **{f"request_{i:03}": request.astype(kind) for i, request in enumerate(self.requests)},
            "n_experts": np.array(self.n_experts),
            "n_prompt": np.array(self.n_prompt),
            "layers": np.array(self.layers),
            "model": np.array(self.model),
        }
        with Path(path).open("wb") as file:
            np.savez_compressed(file, **arrays)

    # --- what it says

    @property
    def n_used(self) -> int:
        """Experts that a token uses in each layer."""
        return int(self.requests[0].shape[2])

    def routes(self, tokens: TracedTokens = "decoded") -> NDArray[np.uint16]:
        """Return the experts of all requests one after the other, of shape (tokens, layers, experts of a token).

        Raises
        ------
        ValueError
            ``tokens`` is unknown.
        """
        check_choice("tokens", tokens, get_args(TracedTokens))
        parts = {
            "decoded": lambda request, n: request[n:],
            "prompt": lambda request, n: request[:n],
            "all": lambda request, n: request,
        }
        return np.concatenate(
            [parts[tokens](request, n) for request, n in zip(self.requests, self.n_prompt, strict=True)]
        )

    def counts(self, tokens: TracedTokens = "decoded") -> NDArray[np.int64]:
        """Return how many tokens used each expert, of shape (layers, n_experts)."""
        routes = self.routes(tokens)
        found = np.zeros((len(self.layers), self.n_experts), np.int64)
        for layer in range(len(self.layers)):
            ids = routes[:, layer]
            found[layer] = np.bincount(ids[ids != UNKNOWN_EXPERT], minlength=self.n_experts)
        return found

    def repeated_share(self, tokens: TracedTokens = "decoded") -> float:
        """Return the share of a token's experts that the token before it used in the same layer; NaN for one token."""
        routes = self.routes(tokens)
        n_known = n_repeated = 0
        for layer in range(len(self.layers)):  # one at a time: each expert is compared with each
            now, before = routes[1:, layer], routes[:-1, layer]
            known = now != UNKNOWN_EXPERT
            n_known += int(known.sum())
            n_repeated += int(((now[:, :, None] == before[:, None, :]).any(axis=2) & known).sum())
        return n_repeated / n_known if n_known else float("nan")

    def reuse_distances(self, tokens: TracedTokens = "decoded") -> NDArray[np.int64]:
        """Return how many requests had how many other experts of their layer used since their expert's last use.

        Returns
        -------
        numpy.ndarray
            int64 of shape (n_experts + 1,); the last counts those without a use before. The sum of the first ``c`` is
            the number of hits of LRU with ``c`` resident experts of each layer (Mattson et al., 1970).
        """
        return np.array(expert_reuse_distances(self.routes(tokens), self.n_experts))

    def replay(self, policy: Policy, resident: float, tokens: TracedTokens = "decoded") -> ExpertReplay:
        """Return what a cache would have answered, from an empty cache and with nothing reset between requests.

        A layer's experts for a token are asked for at once: those that are resident then are hits. Misses are inserted
        after that, in the router's order, and then those that are too many leave.

        Parameters
        ----------
        policy
            Which experts are resident; see :data:`Policy`.
        resident
            The share of each layer's experts that the cache holds, over 0 and at most 1. It holds the nearest whole
            number of them, and at least one.
        tokens
            Which tokens of the trace are replayed.

        Raises
        ------
        ValueError
            An argument is out of range.
        """
        check_choice("policy", policy, POLICIES)
        share = as_real("resident", resident)
        if not 0 < share <= 1:
            raise ValueError(f"resident must be over 0 and at most 1, not {share}")
        routes = self.routes(tokens)
        n_resident = max(1, round(share * self.n_experts))
        counts = replay_experts(routes, self.n_experts, CachePolicy[policy.replace("-", "_")], n_resident)
        n_tokens = len(routes) - len(routes) // 2 if policy == "fixed" else len(routes)
        by_layer = (tuple(part) for part in (counts.n_requests, counts.n_hits, counts.n_insertions))
        return ExpertReplay(policy, n_resident, self.n_experts, n_tokens, *by_layer)


_MOST_BYTES = 16 << 30
_MOST_LAYERS = 65535


def _read_arrays(path: str | os.PathLike[str]) -> Mapping[str, NDArray[Any]]:
    try:
        with Path(path).open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("it is no archive")
            with zipfile.ZipFile(file) as archive:
                n_bytes = sum(one.file_size for one in archive.infolist())
            if n_bytes > _MOST_BYTES:
                raise ValueError(f"its arrays have {n_bytes} bytes, more than {_MOST_BYTES}")
            file.seek(0)
            arrays = np.load(file, allow_pickle=False)
            known = ("n_experts", "n_prompt", "layers", "model")
            return {name: arrays[name] for name in arrays.files if name.startswith("request") or name in known}
    except OSError as error:
        raise Error(f"{path}: {error.strerror or error}") from None
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, MemoryError, RuntimeError) as error:
        raise ValueError(f"{path} is no .npz file of arrays: {error}") from None


def _as_routes(array: NDArray[Any], n_experts: int | None) -> NDArray[np.uint16]:
    """Return an array as uint16; of so many experts, the largest number of its type stands for what is unknown."""
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or array.ndim != 3:
        what = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "other content"
        raise ValueError(f"routes must be integers of shape (tokens, layers, experts), not {what}")
    if array.shape[1] > _MOST_LAYERS or array.shape[2] > _MOST_LAYERS:
        raise ValueError(f"routes must be of at most {_MOST_LAYERS} layers, and as many experts of a token")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) <= UNKNOWN_EXPERT:
        raise ValueError(f"experts must be 0 to {UNKNOWN_EXPERT}, not {array.min()} to {array.max()}")
    routes = array.astype(np.uint16)
    largest = np.iinfo(array.dtype).max
    if n_experts is not None and largest >= n_experts:
        routes[array == largest] = UNKNOWN_EXPERT
    return routes


def _largest(requests: Sequence[NDArray[np.uint16]]) -> int:
    return max((int(request[request != UNKNOWN_EXPERT].max(initial=0)) for request in requests), default=0)
