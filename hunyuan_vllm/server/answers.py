"""How many requests were answered with which status, as their clients saw it, for /metrics.

vLLM's http_requests_total counts what its own application said; mistakes that it answers with 500 reach clients as 400.
"""

from __future__ import annotations

from prometheus_client import Counter

__all__ = ["count_answer"]

_answered = Counter("hunyuan_requests_answered", "Requests, probes apart, by the status clients saw", ["status"])
for _status in ("2xx", "3xx", "4xx", "5xx"):
    _answered.labels(_status)  # a rate wants the zero before the first


def count_answer(status: int) -> None:
    """Count one; `status` is that of HTTP."""
    _answered.labels(f"{status // 100}xx").inc()
