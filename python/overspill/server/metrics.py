"""Figures of a server, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import Scope

from overspill.base.values import Stats

__all__ = ["Metrics"]

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Metrics:
    """Counts of requests and tokens, and times, since the server began."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._registry = one = CollectorRegistry()
        by_model = ["model"]
        self.requests = Counter("overspill_requests", "Requests by path and status.", ["path", "status"], registry=one)
        self.active = Gauge("overspill_active_requests", "Requests for texts that run or wait.", registry=one)
        self._prompt = Counter("overspill_prompt_tokens", "Tokens of prompts.", by_model, registry=one)
        self._cached = Counter("overspill_cached_prompt_tokens", "Of a KV cache.", by_model, registry=one)
        self._reply = Counter("overspill_reply_tokens", "Tokens of replies.", by_model, registry=one)
        self._first = Histogram(
            "overspill_first_token_seconds", "Until the first token.", by_model, buckets=_SECONDS, registry=one
        )

    def count_answer(self, scope: Scope, status: int) -> None:
        """Count an answer."""
        self.requests.labels(getattr(scope.get("route"), "path", ""), str(status)).inc()

    def add(self, model: str, stats: Stats) -> None:
        """Count a stream that has ended."""
        self._prompt.labels(model).inc(stats.prompt_tokens)
        self._cached.labels(model).inc(stats.cached_tokens)
        self._reply.labels(model).inc(stats.tokens)
        if stats.time_to_first_token_s is not None:
            self._first.labels(model).observe(stats.time_to_first_token_s)

    def text(self) -> bytes:
        """Return all of them in Prometheus' text format."""
        return generate_latest(self._registry)
