"""How often the supervisor has restarted the server, for /metrics: it tells each server by an environment variable."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import REGISTRY, CollectorRegistry, Gauge
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from hunyuan_vllm.server.shared_metrics import are_shared

__all__ = ["export_restarts"]

NAME = "hunyuan_supervisor_restarts"
HELP = "Restarts of the server by its supervisor"


class _Restarts(Collector):
    def __init__(self, count: int) -> None:
        self._count = count

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(NAME, HELP, value=self._count)


def export_restarts(count: int | None, registry: CollectorRegistry = REGISTRY) -> None:
    """Have /metrics say hunyuan_supervisor_restarts_total; nothing where no supervisor is (None)."""
    if count is None:
        return
    if are_shared():
        # Counters are added up there, over API servers that all say the same.
        Gauge(f"{NAME}_total", HELP, registry=registry, multiprocess_mode="max").set(count)
    else:
        registry.register(_Restarts(count))
