"""What to expect of a model whose experts are in RAM, with a cache of some of them on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from overspill._core import Error
from overspill.base.checks import as_instance, as_integer, as_real
from overspill.base.text import short_repr
from overspill.base.units import format_bytes
from overspill.base.values import DEFAULT_CACHE_TYPE
from overspill.header.info import ModelInfo
from overspill.machine.hardware import Hardware
from overspill.planning.plan import Plan, plan
from overspill.planning.residency import experts_bytes

__all__ = ["ExpertCachePlan", "plan_expert_cache"]


@dataclass(frozen=True)
class ExpertCachePlan:
    """The speed of a model by the share of its experts' requests that a GPU answers from a cache.

    A token takes the time that the planner expects with all experts in RAM, but for the experts themselves: in each
    layer, the GPU reads the hits while the CPU reads the misses, and insertions are read from the same RAM
    (docs/offload.md has the arithmetic). It takes no less than the copies of its insertions over the link, as weights
    in RAM are held by the plan.
    """

    planned: Plan
    """With all experts in RAM."""
    link_bytes_per_s: float
    """Rate of copies of experts to the GPU."""
    expert_bytes: int
    """Bytes of one expert of a layer, of all its matrices."""
    experts_bytes: int
    """Bytes of all experts of all layers."""

    def __repr__(self) -> str:
        """Return the bytes of the experts, and the plan, in brackets."""
        return short_repr(self, f"of {format_bytes(self.experts_bytes)} of experts beside {self.planned!r}")

    @property
    def room_bytes(self) -> int:
        """Bytes that the plan leaves free on the first GPU, beyond the margin."""
        return self.planned.forecast().memory[self.planned.hardware.gpus[0].name].room_bytes

    def tokens_per_s(self, hit_share: float, insertions_per_token: float = 0.0) -> float:
        """Return the expected rate of decoding.

        Parameters
        ----------
        hit_share
            The share of the experts that the cache answers, 0 to 1.
        insertions_per_token
            Experts that are copied into the cache for a token, in all layers, at least 0.

        Raises
        ------
        ValueError
            A number is out of range.
        """
        share, n = _share("hit_share", hit_share), as_real("insertions_per_token", insertions_per_token)
        if not 0 <= n < float("inf"):
            raise ValueError(f"insertions_per_token must be at least 0 and finite, not {n}")
        estimate = replace(self.planned.estimate(), pools={0: self.experts_bytes}, hit_share=share, insertions=n)
        computing_s = 1 / self.planned.forecast().tokens_per_s + estimate.cache_s
        return 1 / max(computing_s, n * self.expert_bytes / self.link_bytes_per_s)

    def resident_bytes(self, share: float) -> int:
        """Return the bytes of a share of all experts, 0 to 1; a ValueError if it is out of range."""
        return round(_share("share", share) * self.experts_bytes)


def _share(name: str, value: float) -> float:
    share = as_real(name, value)
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must be 0 to 1, not {share}")
    return share


def plan_expert_cache(info: ModelInfo, hardware: Hardware, *, n_ctx: int | None = None) -> ExpertCachePlan:
    """Return what to expect of caches of experts on the first GPU of some hardware.

    Raises
    ------
    Error
        The model has no experts, or the hardware no GPU.
    ValueError
        ``n_ctx`` is not at least 1.
    """
    as_instance("info", info, ModelInfo)
    if n_ctx is not None:
        n_ctx = as_integer("n_ctx", n_ctx, 1, 2**31 - 1)
    if not info.expert_layers:
        raise Error(f"{info.name or info.architecture} has no experts: only a mixture of experts has")
    if not as_instance("hardware", hardware, Hardware).gpus:
        raise Error("a cache of experts needs a GPU, and the hardware has none")
    planned = plan(
        info, hardware=hardware, n_ctx=n_ctx, type_k=DEFAULT_CACHE_TYPE, pins={"experts": "cpu"}, experts="static"
    )
    all_bytes = experts_bytes(info)
    expert_bytes = all_bytes // (len(info.expert_layers) * info.n_experts)
    return ExpertCachePlan(planned, planned.estimate().work.copy_bytes_per_s(0), expert_bytes, all_bytes)
