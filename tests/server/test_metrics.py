"""The figures of our own in /metrics, beside an engine that says what it is told to."""

import asyncio
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import forked_programs
import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from hunyuan_vllm.config import HunYuanConfig
from hunyuan_vllm.expert_load import EXTENSION
from hunyuan_vllm.server.middleware import metrics
from hunyuan_vllm.server.middleware.metrics import EngineMetrics, sharing_factor

USAGE = "vllm:kv_cache_usage_perc"


def config(**changes) -> HunYuanConfig:
    return HunYuanConfig(**({"use_cla": True, "cla_share_factor": 2, "num_hidden_layers": 6} | changes))


class Engine:
    """Two workers, of which each has a layer."""

    def __init__(self, extension: str = ""):
        self.loads = [{0: [3, 4]}, {1: [7, 0]}]
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(hf_config=config()),
            cache_config=SimpleNamespace(kv_cache_size_tokens=1000, num_gpu_blocks=63, block_size=16),
            parallel_config=SimpleNamespace(worker_extension_cls=extension),
        )

    async def generate(self):
        yield

    async def collective_rpc(self, method, args):
        assert method == "expert_load"
        if self.loads is None:
            await asyncio.sleep(60)
        return self.loads


@pytest.fixture
def registry():
    made = CollectorRegistry(auto_describe=True)  # as the one that /metrics shows
    usage = Gauge(USAGE, "share", ["engine"], registry=made)
    usage.labels("0").set(0.25)
    usage.labels("1").set(1)
    return made


def of_engine(engine: Engine, registry: CollectorRegistry) -> EngineMetrics:
    return EngineMetrics(engine, lambda: registry.restricted_registry([USAGE]).collect())


def samples(registry: CollectorRegistry) -> list[str]:
    return [line for line in generate_latest(registry).decode().splitlines() if line.startswith("hunyuan_")]


def test_the_cache_in_tokens(registry):
    registry.register(of_engine(Engine(), registry))
    assert samples(registry) == [
        "hunyuan_cla_sharing_factor 2.0",
        'hunyuan_kv_cache_capacity_tokens{engine="0"} 1000.0',
        'hunyuan_kv_cache_capacity_tokens{engine="1"} 1000.0',
        'hunyuan_kv_cache_used_tokens{engine="0"} 250.0',
        'hunyuan_kv_cache_used_tokens{engine="1"} 1000.0',
    ]


async def test_experts_are_there_where_workers_count(registry, monkeypatch):
    engine = Engine(EXTENSION)
    own = of_engine(engine, registry)
    registry.register(own)
    assert not any("expert" in line for line in samples(registry))
    await own.fetch()
    expected = [
        f'hunyuan_expert_tokens_total{{expert="{expert}",layer="{layer}"}} {count}'
        for layer, expert, count in ((0, 0, 3.0), (0, 1, 4.0), (1, 0, 7.0), (1, 1, 0.0))
    ]
    assert samples(registry)[-4:] == expected
    # An engine that does not answer delays a scrape and removes no figure.
    monkeypatch.setattr(metrics, "SCRAPE_TIMEOUT", 0.05)
    engine.loads = None
    await own.fetch()
    assert samples(registry)[-4:] == expected


async def test_an_engine_that_does_not_count_is_not_asked(registry):
    engine = Engine()
    engine.collective_rpc = None
    await of_engine(engine, registry).fetch()


# What an API server does that shares its metrics with others: one that prometheus_client sees as it is imported.
SEVERAL = """
import asyncio
from types import SimpleNamespace
import httpx
from prometheus_client import Gauge, make_asgi_app
from test_metrics import USAGE, Engine
from vllm.v1.metrics.prometheus import get_prometheus_registry
from hunyuan_vllm.server.middleware import metrics

async def ask():
    await own({"type": "lifespan", "app": SimpleNamespace(state=SimpleNamespace(engine_client=engine))}, None, None)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(own), base_url="http://server") as client:
        wishes = {"Accept": "application/openmetrics-text", "Accept-Encoding": "gzip"}
        answer = await client.get("/metrics", headers=wishes)
        assert int(answer.headers["content-length"]) == len(answer.content)
        print(answer.text)

async def app(scope, receive, send):
    if scope["type"] == "http":
        await make_asgi_app(registry=get_prometheus_registry())(scope, receive, send)

metrics.server_info = lambda config: Gauge("hunyuan_server_info", "as in truth", registry=None)
Gauge(USAGE, "share", ["engine"], multiprocess_mode="mostrecent").labels("0").set(0.25)
engine, own = Engine(), metrics.Metrics(app)
asyncio.run(ask())
"""


def test_several_api_servers_have_them_too(tmp_path):
    directories = ":".join(str(directory) for directory in Path(__file__).parents[:2])
    environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": directories}
    done = forked_programs.run([sys.executable, "-c", SEVERAL], environ)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line in (
        'vllm:kv_cache_usage_perc{engine="0"} 0.25',
        "hunyuan_cla_sharing_factor 2.0",
        'hunyuan_kv_cache_used_tokens{engine="0"} 250.0',
        "hunyuan_server_info 0.0",
    ):
        assert lines.count(line) == 1, done.stdout
    assert "# EOF" not in lines


def test_the_sharing_factor(monkeypatch):
    assert sharing_factor(config()) == 2
    assert sharing_factor(config(cla_share_factor=4)) == 3  # six layers: owners 0 and 4
    assert sharing_factor(config(use_cla=False)) == 1
    monkeypatch.setenv("HUNYUAN_VLLM_CLA_SHARING", "0")
    assert sharing_factor(config()) == 1
