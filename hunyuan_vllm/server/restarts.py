"""How often the supervisor has restarted the server, for /metrics: it tells each server by an environment variable."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

__all__ = ["export_restarts"]

NAME = "hunyuan_supervisor_restarts"


class _Restarts(Collector):
    def __init__(self, count: int) -> None:
        self._count = count

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(NAME, "Restarts of the server by its supervisor", value=self._count)


def export_restarts(count: int | None, registry: CollectorRegistry = REGISTRY) -> None:
    """Have /metrics say hunyuan_supervisor_restarts_total; nothing where no supervisor is (None)."""
    if count is not None:
        registry.register(_Restarts(count))
