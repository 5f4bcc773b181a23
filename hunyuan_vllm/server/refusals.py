"""How many requests were refused, and for which reason, for /metrics."""

from __future__ import annotations

from prometheus_client import Counter

__all__ = ["REASONS", "count_refusal"]

REASONS = (
    "key",
    "route",
    "body",
    "slow",
    "json",
    "max_tokens",
    "sequences",
    "prompt_tokens",
    "key_requests",
    "queue",
)
_refused = Counter("hunyuan_requests_refused", "Requests refused before the engine heard of them", ["reason"])
for _reason in REASONS:
    _refused.labels(_reason)  # a rate wants the zero before the first


def count_refusal(reason: str) -> None:
    """Count one; `reason` is one of REASONS."""
    _refused.labels(reason).inc()
