"""ASGI middleware that adds to vLLM's /metrics what is this model's own: its cache in tokens, sharing, and experts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from vllm.engine.protocol import EngineClient
from vllm.logger import init_logger
from vllm.v1.metrics.prometheus import get_prometheus_registry

from hunyuan_vllm import envs
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.expert_load import EXTENSION, Loads
from hunyuan_vllm.server.asgi import App, Receive, Scope, Send
from hunyuan_vllm.server.described import describe
from hunyuan_vllm.server.shared_metrics import adding, are_shared, plainly
from hunyuan_vllm.server.token_counts import count_tokens

__all__ = ["EngineMetrics", "OwnMetrics", "sharing_factor"]

logger = init_logger(f"vllm.{__name__}")  # vLLM configures only loggers below its own name
METRICS = "/metrics"
USAGE = "vllm:kv_cache_usage_perc"  # a fraction in truth
PATIENCE = 2.0  # seconds that a scrape waits for the workers' counts; it shows the last ones then


def sharing_factor(config: HunYuanConfig) -> float:
    """Layers for each layer that has a KV cache of its own: how many times the tokens fit into the same memory."""
    layers = range(config.num_hidden_layers)
    owners = sum(not (config.is_cross(layer) and envs.cla_sharing()) for layer in layers)
    return config.num_hidden_layers / owners


def vllms_metrics() -> Iterable[Metric]:
    """Those that have the usage of the cache among them; more only where they have to be read all at once."""
    return get_prometheus_registry().collect() if are_shared() else REGISTRY.restricted_registry([USAGE]).collect()


class EngineMetrics(Collector):
    """The figures of one engine, as they are when they are asked for."""

    def __init__(self, engine: EngineClient, vllms: Callable[[], Iterable[Metric]] = vllms_metrics) -> None:
        config = engine.vllm_config
        self._vllms = vllms
        self._engine = engine
        self._factor = sharing_factor(config.model_config.hf_config)
        cache = config.cache_config
        self._tokens = cache.kv_cache_size_tokens or (cache.num_gpu_blocks or 0) * cache.block_size  # of each engine
        self._counts_experts = config.parallel_config.worker_extension_cls == EXTENSION
        self._loads: Loads | None = None

    async def fetch(self, afresh: bool = False) -> None:
        """Ask the workers how many tokens each expert has had, if they count."""
        if not self._counts_experts:
            return
        try:
            async with asyncio.timeout(PATIENCE):
                answers: list[Loads] = await self._engine.collective_rpc("expert_load", args=(afresh,))
        except Exception as error:  # a scrape must show the rest, above all when the engine is in trouble
            logger.warning_once("The load of experts is not to be had: %s", type(error).__name__)
            return
        loads: Loads = {}
        for answer in answers:
            for layer, tokens in answer.items():
                before = loads.get(layer, [0] * len(tokens))
                loads[layer] = [one + other for one, other in zip(before, tokens, strict=True)]
        self._loads = loads

    def describe(self) -> Iterator[Metric]:
        """Without it the registry, locked, would collect to learn the names; collecting asks the registry."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "hunyuan_cla_sharing_factor", "Layers for each layer with a KV cache of its own", value=self._factor
        )
        capacity = GaugeMetricFamily(
            "hunyuan_kv_cache_capacity_tokens", "Tokens that fit into the KV cache", labels=["engine"]
        )
        used = GaugeMetricFamily(
            "hunyuan_kv_cache_used_tokens",
            "Tokens for which the KV cache is in use, in whole blocks",
            labels=["engine"],
        )
        for name, usage in self._usage():
            capacity.add_metric([name], self._tokens)
            used.add_metric([name], round(usage * self._tokens))
        yield capacity
        yield used
        if self._loads is not None:
            experts = CounterMetricFamily(
                "hunyuan_expert_tokens", "Tokens given to an expert of a layer", labels=["layer", "expert"]
            )
            for layer, tokens in sorted(self._loads.items()):
                for expert, count in enumerate(tokens):
                    experts.add_metric([str(layer), str(expert)], count)
            yield experts

    def _usage(self) -> Iterator[tuple[str, float]]:
        """Each engine's name and the fraction of its cache that is in use, by vLLM's own metric."""
        found = False
        for family in self._vllms():
            for sample in family.samples:
                if sample.name == USAGE:
                    found = True
                    yield sample.labels["engine"], sample.value
        if not found:  # its statistics are switched off
            yield "0", 0.0


class OwnMetrics:
    """Registers the figures when the server starts, and has them fresh when somebody asks for /metrics."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._metrics: EngineMetrics | None = None
        self._added: CollectorRegistry | None = None  # to an answer; None where one registry shows all

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            engine = scope["app"].state.engine_client
            info = describe(engine.vllm_config)
            count_tokens(engine)
            self._metrics = EngineMetrics(engine)
            if are_shared():
                self._added = CollectorRegistry()
                self._added.register(info)
            (self._added or REGISTRY).register(self._metrics)
            await self._metrics.fetch(afresh=True)
        elif scope["type"] == "http" and self._metrics is not None and scope["path"] == METRICS:
            await self._metrics.fetch()
            if self._added is not None:
                scope, send = plainly(scope), adding(send, self._added)
        await self._app(scope, receive, send)
