"""/metrics: counters of requests and refusals, and the figures of this model, beside vLLM's own"""

import asyncio
import os
import re
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Info, generate_latest
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
from hunyuan_vllm.plugin import installed_vllm
from hunyuan_vllm.server.middleware.asgi import App, Message, Receive, Scope, Send
from hunyuan_vllm.server.middleware.generation import count_tokens

logger = init_logger(f"vllm.{__name__}")  # vLLM configures only loggers below its own name

_answered = Counter("hunyuan_requests_answered", "Requests except probes, by the status that clients saw", ["status"])
for _status in ("2xx", "3xx", "4xx", "5xx"):
    _answered.labels(_status)  # rate() needs the zero before the first


def count_answer(status: int) -> None:
    _answered.labels(f"{status // 100}xx").inc()


REASONS = (
    "key", "route", "body", "slow", "json", "field", "max_tokens", "sequences", "prompt_tokens", "key_requests",
    "queue",
)  # fmt: skip
_refused = Counter("hunyuan_requests_refused", "Requests refused before they reached the engine", ["reason"])
for _reason in REASONS:
    _refused.labels(_reason)


def count_refusal(reason: str) -> None:
    _refused.labels(reason).inc()


SHARED_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"  # set by vLLM for several API servers
NEGOTIATED = (b"accept", b"accept-encoding")


def are_shared() -> bool:
    """Whether several API servers share their metrics."""
    return SHARED_DIRECTORY in os.environ


def adding(send: Send, registry: CollectorRegistry) -> Send:
    """`send` for an answer in Prometheus's text format and in one piece; appends the metrics of `registry`."""
    start: Message = {}

    async def add(message: Message) -> None:
        nonlocal start
        if message["type"] == "http.response.start":
            start = message
            return
        body = message.get("body", b"") + generate_latest(registry)
        headers = [pair for pair in start["headers"] if pair[0].lower() != b"content-length"]
        await send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await send({**message, "body": body})

    return add


CPUINFO = Path("/proc/cpuinfo")
_info = Info("hunyuan_server", "The machine, versions and options of the server")


def server_info(config: VllmConfig) -> Info:
    """Set `hunyuan_server_info`: `device`, `devices` and `cores` are the machine's, the others versions and options."""
    model, parallel, scheduler = config.model_config, config.parallel_config, config.scheduler_config
    labels = {
        "device": _cpu() if current_platform.is_cpu() else current_platform.get_device_name(),
        "devices": parallel.world_size * parallel.data_parallel_size,  # on CPUs the ranks
        "cores": len(os.sched_getaffinity(0)),
        "version": __version__,
        "vllm": (installed_vllm() or ("", "unknown"))[1],
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


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else os.uname().machine


METRICS = "/metrics"
USAGE = "vllm:kv_cache_usage_perc"  # a fraction, despite its name
SCRAPE_TIMEOUT = 2.0  # seconds a scrape waits for the workers' counts before it shows the last ones


def sharing_factor(config: HunYuanConfig) -> float:
    """Layers per layer with a KV cache of its own: the factor by which CLA sharing increases the cache's tokens."""
    layers = range(config.num_hidden_layers)
    owners = sum(not (config.is_cross(layer) and envs.cla_sharing()) for layer in layers)
    return config.num_hidden_layers / owners


def vllm_metrics() -> Iterable[Metric]:
    """vLLM's metrics, with the usage of the cache; the others only if they can only be read all at once."""
    return get_prometheus_registry().collect() if are_shared() else REGISTRY.restricted_registry([USAGE]).collect()


class EngineMetrics(Collector):
    def __init__(self, engine: EngineClient, metrics: Callable[[], Iterable[Metric]] = vllm_metrics) -> None:
        config = engine.vllm_config
        self._vllm_metrics = metrics
        self._engine = engine
        self._factor = sharing_factor(config.model_config.hf_config)
        cache = config.cache_config
        self._tokens = cache.kv_cache_size_tokens or (cache.num_gpu_blocks or 0) * cache.block_size  # of each engine
        self._counts_experts = config.parallel_config.worker_extension_cls == EXTENSION
        self._loads: Loads | None = None

    async def fetch(self, reset: bool = False) -> None:
        """Read from the workers how many tokens each expert has processed, if they count."""
        if not self._counts_experts:
            return
        try:
            async with asyncio.timeout(SCRAPE_TIMEOUT):
                answers: list[Loads] = await self._engine.collective_rpc("expert_load", args=(reset,))
        except Exception as error:  # a scrape must show the others, especially when the engine fails
            logger.warning_once("The load of experts is unavailable: %s", type(error).__name__)
            return
        loads: Loads = {}
        for answer in answers:
            for layer, tokens in answer.items():
                before = loads.get(layer, [0] * len(tokens))
                loads[layer] = [one + other for one, other in zip(before, tokens, strict=True)]
        self._loads = loads

    def describe(self) -> Iterator[Metric]:
        """Without it the registry would collect while locked, to learn the names, and collecting needs the registry."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "hunyuan_cla_sharing_factor", "Layers per layer with a KV cache of its own", value=self._factor
        )
        name, text = "hunyuan_kv_cache_capacity_tokens", "Tokens that fit into the KV cache"
        capacity = GaugeMetricFamily(name, text, labels=["engine"])
        name, text = "hunyuan_kv_cache_used_tokens", "Tokens held in the KV cache, in whole blocks"
        used = GaugeMetricFamily(name, text, labels=["engine"])
        for name, usage in self._usage().items():
            capacity.add_metric([name], self._tokens)
            used.add_metric([name], round(usage * self._tokens))
        yield capacity
        yield used
        if self._loads is not None:
            experts = CounterMetricFamily(
                "hunyuan_expert_tokens", "Tokens processed by an expert of a layer", labels=["layer", "expert"]
            )
            for layer, tokens in sorted(self._loads.items()):
                for expert, count in enumerate(tokens):
                    experts.add_metric([str(layer), str(expert)], count)
            yield experts

    def _usage(self) -> dict[str, float]:
        """Each engine's name and the used fraction of its cache, from vLLM's own metric."""
        samples = [sample for family in self._vllm_metrics() for sample in family.samples if sample.name == USAGE]
        return {sample.labels["engine"]: sample.value for sample in samples} or {"0": 0.0}  # statistics are disabled


class Metrics:
    """Registers the metrics when the server starts, and refreshes them for each request to /metrics."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._metrics: EngineMetrics | None = None
        self._added: CollectorRegistry | None = None  # appended to an answer; None if one registry has all

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            engine = scope["app"].state.engine_client
            info = server_info(engine.vllm_config)
            count_tokens(engine)
            self._metrics = EngineMetrics(engine)
            if are_shared():
                self._added = CollectorRegistry()
                self._added.register(info)
            (self._added or REGISTRY).register(self._metrics)
            await self._metrics.fetch(reset=True)
        elif scope["type"] == "http" and self._metrics is not None and scope["path"] == METRICS:
            await self._metrics.fetch()
            if self._added is not None:
                # An answer that text can be appended to: no OpenMetrics, which has an end mark, and no compression.
                headers = [pair for pair in scope["headers"] if pair[0].lower() not in NEGOTIATED]
                scope, send = {**scope, "headers": headers}, adding(send, self._added)
        await self._app(scope, receive, send)
