"""A sampler in the caller's hands, which chooses tokens from any logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Unpack

import numpy as np
from numpy.typing import NDArray

from overspill._core import Sampler as NativeSampler
from overspill._core import SamplerState
from overspill.base.checks import as_instance, as_integer, as_mapping, as_real, shown
from overspill.base.text import short_repr
from overspill.sampling.options import SamplingKeywords, SamplingOptions, merge

__all__ = ["DryVocabulary", "Sampler"]


class DryVocabulary(Protocol):
    """The part of a model that DRY needs: the tokens of its sequence breakers."""

    def dry_breakers(self, texts: Sequence[str]) -> list[list[int]]:
        """Return every sequence of token ids in which one of the texts can be written."""


class Sampler:
    """A sampler, which chooses tokens from logits as :meth:`Model.stream` does.

    It takes any contiguous float32 row, not only a model's, and does not change it:

    >>> sampler = overspill.Sampler(temperature=0.7, top_p=0.9, top_k=0, seed=1)
    >>> token = sampler.sample(model.eval(tokens))
    >>> sampler.accept(token)

    Draws depend on the seed and the logits alone: they are the same in every process and on every
    instruction set. Save :attr:`state` as JSON, or the sampler by pickle, to go on later.

    Parameters
    ----------
    options
        The options. Options as keywords overrule them.
    model
        The model whose tokens DRY's sequence breakers are made of; needed for these alone.

    Raises
    ------
    ValueError, TypeError
        An option is out of its range.
    """

    def __init__(
        self,
        options: SamplingOptions | None = None,
        *,
        model: DryVocabulary | None = None,
        **keywords: Unpack[SamplingKeywords],
    ) -> None:
        """Make a sampler in its initial state."""
        if options is not None:
            as_instance("options", options, SamplingOptions)
        if model is not None and not callable(getattr(model, "dry_breakers", None)):
            raise TypeError(f"model must be an overspill.Model, not {shown(model)}")
        self._options = merge(SamplingOptions() if options is None else options, keywords)
        self._breakers: Sequence[Sequence[int]] = ()
        if self._options.dry_multiplier > 0 and self._options.dry_sequence_breakers:
            if model is None:
                raise ValueError("dry_sequence_breakers are texts, which need a model: give model=..., or () for none")
            self._breakers = model.dry_breakers(self._options.dry_sequence_breakers)
        self._core = NativeSampler(self._options._native(self._breakers))

    @property
    def options(self) -> SamplingOptions:
        """The options of the sampler."""
        return self._options

    def sample(self, logits: NDArray[np.float32], *, allowed: NDArray[np.uint32] | None = None) -> int:
        """Return the id of the token that it chooses.

        Parameters
        ----------
        logits
            float32, contiguous, of shape (n_vocab,). Tokens at ``-inf`` are never chosen.
        allowed
            uint32 or int32, of shape (ceil(n_vocab / 32),): bit ``i % 32`` of word ``i // 32`` is set for
            each token ``i`` that may be chosen. Default: all tokens.

        Raises
        ------
        Error
            A logit is NaN, all are infinite, or no token is left to choose.
        ValueError, TypeError
            An array has another shape or dtype.
        """
        return self._core.sample(logits, allowed)

    def distribution(
        self, logits: NDArray[np.float32], *, allowed: NDArray[np.uint32] | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the ids that the next :meth:`sample` would draw from, and their probabilities, most likely first.

        Arguments and errors are those of :meth:`sample`; the state stays the same.

        Returns
        -------
        tuple of numpy.ndarray
            int32 ids and float32 probabilities, of one shape (n_left,).
        """
        return self._core.distribution(logits, allowed)

    def accept(self, token: int) -> None:
        """Add ``token`` to the text that penalties and DRY look at."""
        self._core.accept(as_integer("token", token, 0, 2**31 - 1))

    def reset(self) -> None:
        """Return to the initial state, with the same seed."""
        self._core.reset()

    def clone(self) -> Sampler:
        """Return an independent copy, which will draw the same tokens."""
        twin = Sampler.__new__(Sampler)
        twin._options = self._options
        twin._breakers = self._breakers
        twin._core = self._core.clone()
        return twin

    @property
    def state(self) -> dict[str, Any]:
        """The state, which JSON can hold; set it to continue from there. The options are not part of it.

        =================  ==============================================
        ``seed``           the seed of the draws
        ``n_draws``        the number of draws so far
        ``history``        the tokens that penalties and DRY look at
        ``mirostat_mu``    Mirostat's limit of surprise
        =================  ==============================================
        """
        state = self._core.state()
        return {
            "seed": state.seed,
            "n_draws": state.n_draws,
            "history": state.history,
            "mirostat_mu": state.mirostat_mu,
        }

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        given = as_mapping("state", state, "what Sampler.state gave")
        try:
            native = SamplerState(
                seed=as_integer("seed", given["seed"], 0, 2**32 - 1),
                n_draws=as_integer("n_draws", given["n_draws"], 0, 2**64 - 1),
                history=[as_integer("history", token, 0, 2**31 - 1) for token in given["history"]],
                mirostat_mu=as_real("mirostat_mu", given["mirostat_mu"]),
            )
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"state must be what Sampler.state gave, not {shown(state)}") from None
        self._core.restore(native)

    def __getstate__(self) -> dict[str, Any]:
        """Return options and state, for pickle."""
        return {"options": self._options, "breakers": self._breakers, "state": self.state}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        """Take options and state from a pickle."""
        self._options = saved["options"]
        self._breakers = saved["breakers"]
        self._core = NativeSampler(self._options._native(self._breakers))
        self.state = saved["state"]

    def __repr__(self) -> str:
        """Return the options in brackets."""
        return short_repr(self, str(self._options))
