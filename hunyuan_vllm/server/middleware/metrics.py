"""/metrics: vLLM's, and what is this model's own"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

from prometheus_client import REGISTRY, CollectorRegistry, Info
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from vllm.config import VllmConfig
from vllm.engine.protocol import EngineClient
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.metrics.prometheus import get_prometheus_registry

from hunyuan_vllm import __version__, envs
from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.expert_load import EXTENSION, Loads
from hunyuan_vllm.server.middleware.asgi import App, Receive, Scope, Send
from hunyuan_vllm.server.middleware.counters import adding, are_shared, count_tokens, plainly
from hunyuan_vllm.vllm_version import installed_version

CPUINFO = Path("/proc/cpuinfo")
_info = Info("hunyuan_server", "What the server runs on, and how it is set up")


def describe(config: VllmConfig) -> Info:
    """Set `hunyuan_server_info`: `device`, `devices` and `cores` are the machine, the rest versions and options."""
    model, parallel, scheduler = config.model_config, config.parallel_config, config.scheduler_config
    labels = {
        **_machine(parallel.world_size * parallel.data_parallel_size),
        "version": __version__,
        "vllm": (installed_version() or ("", "unknown"))[1],
        "torch": metadata.version("torch"),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization or "none",
        "kv_cache_dtype": config.cache_config.cache_dtype,
        "prefix_caching": config.cache_config.enable_prefix_caching,
        "tensor_parallel": parallel.tensor_parallel_size,
        "pipeline_parallel": parallel.pipeline_parallel_size,
        "data_parallel": parallel.data_parallel_size,
        "max_model_len": model.max_model_len,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "enforce_eager": model.enforce_eager,
    }
    _info.info({name: str(value) for name, value in labels.items()})
    return _info


def _machine(ranks: int) -> dict[str, object]:
    """`device` is the kind of GPU or CPU; `devices` the GPUs, or ranks on CPUs; `cores` this host's that it may use."""
    device = _cpu() if current_platform.is_cpu() else current_platform.get_device_name()
    return {"device": device, "devices": ranks, "cores": len(os.sched_getaffinity(0))}


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else os.uname().machine


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
