"""Probes and the refusal of requests while draining, around an application that does as it is told."""

import asyncio
import json
import os
import signal
import sys
from contextlib import asynccontextmanager
from types import SimpleNamespace

import forked_programs
import httpx
import pytest
from logged import messages_of
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from hunyuan_vllm.server.exit_cause import exit_cause
from hunyuan_vllm.server.middleware import health
from hunyuan_vllm.server.middleware.health import Health, export_restarts
from hunyuan_vllm.util.errors import UserError

TIMEOUT = 0.2


class Application:
    """Stands for vLLM's: `answer` is what a completion comes to, `steps` what its engine does between."""

    def __init__(self):
        self.asked, self.warm_ups = [], []  # headers of the plain completions; bodies of those before the first
        self.answer = self.at_once
        parallel = SimpleNamespace(data_parallel_size=2)
        config = SimpleNamespace(parallel_config=parallel)
        self.engine = SimpleNamespace(errored=False, is_sleeping=self.at_once, vllm_config=config)
        self.state = SimpleNamespace(engine_client=self.engine)

    async def at_once(self):
        return 200

    async def never(self):
        await asyncio.Event().wait()

    async def refused(self):
        return 500

    async def failing(self):
        raise RuntimeError("boom")

    async def __call__(self, scope, receive, send):
        assert scope["app"] is self
        if scope["type"] == "lifespan":
            return
        body = json.loads((await receive()).get("body") or "{}") if scope["path"] == "/v1/completions" else {}
        if self.asked or body == health.REQUEST:
            self.asked.append(dict(scope["headers"]))
        else:
            self.warm_ups.append(body)
        status = await self.answer()
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


@pytest.fixture
def application(monkeypatch):
    monkeypatch.setenv("HUNYUAN_VLLM_READY_TIMEOUT", str(TIMEOUT))
    monkeypatch.setattr(health, "KEPT", 0.1)
    return Application()


@asynccontextmanager
async def client_of(middleware, application):
    async def served(scope, receive, send):  # as Starlette does before it calls the first middleware
        await middleware({**scope, "app": application}, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(served), base_url="http://server") as client:
        yield client


def around(application):
    return Health(application, bare=application)


async def probe(application, path="/readyz", method="GET"):
    async with client_of(around(application), application) as client:
        return await client.request(method, path)


async def test_ready_is_a_completion(application):
    answer = await probe(application)
    assert (answer.status_code, answer.json()["status"]) == (200, "ready")
    assert answer.headers["cache-control"] == "no-store"
    assert len(application.asked) == 1


async def test_the_first_requests_warm_up_what_clients_can_ask_for(application):
    async with client_of(around(application), application) as client:
        assert (await client.get("/readyz")).json()["status"] == "ready"
        asked = {name for body in application.warm_ups for name in body}
        assert asked >= {"prompt_logprobs", "logprobs", "structured_outputs", "top_p", "top_k"}
        assert {len(body["prompt"]) for body in application.warm_ups} == {2}  # one for each engine
        warm_ups = len(application.warm_ups)
        await asyncio.sleep(health.KEPT)
        assert (await client.get("/readyz")).json()["status"] == "ready"
    assert (len(application.warm_ups), len(application.asked)) == (warm_ups, 2)


async def test_a_slow_warm_up_is_not_ready_nor_busy_by_its_own_tokens(application, tokens):
    compiled = asyncio.Event()

    async def compiling():
        tokens.inc()
        await compiled.wait()
        return 200

    application.answer = compiling
    async with client_of(around(application), application) as client:
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()["status"]) == (503, "warming")
        assert len(application.warm_ups) == 1
        await asyncio.sleep(health.KEPT)
        compiled.set()
        assert (await client.get("/readyz")).status_code == 200
    assert len(application.warm_ups) == len(health.WARM_UP)  # the slow one went on meanwhile
    assert len(application.asked) == 1


@pytest.mark.parametrize("failure", ["refused", "failing"])
async def test_a_warm_up_that_fails_does_not_keep_a_server_from_being_ready(application, failure):
    async def only_plain_ones():
        return 200 if application.asked else await getattr(application, failure)()

    application.answer = only_plain_ones
    assert (await probe(application)).json()["status"] == "ready"
    assert len(application.warm_ups) == len(health.WARM_UP)


@pytest.fixture
def warm(monkeypatch):
    """The server's first requests are over."""
    monkeypatch.setattr(health, "WARM_UP", ())


@pytest.fixture
def tokens(monkeypatch):
    """vLLM's counter of generated tokens, for as long as a test runs: among no others, an engine may have run here."""
    registry = CollectorRegistry()
    monkeypatch.setattr(health, "REGISTRY", registry)
    return Counter("vllm:generation_tokens", "as in vLLM", ["engine"], registry=registry).labels("0")


@pytest.mark.parametrize(
    ("completion", "engine", "status"),
    [
        ("refused", {}, "failed"),
        ("failing", {}, "failed"),
        ("never", {"is_sleeping": "at_once"}, "slow"),
        ("never", {"is_sleeping": "never"}, "stalled"),
        ("never", {"is_sleeping": "failing"}, "stalled"),
        ("at_once", {"errored": True}, "dead"),
    ],
)
async def test_what_is_not_ready(application, warm, tokens, completion, engine, status):
    application.answer = getattr(application, completion)
    for name, value in engine.items():
        setattr(application.engine, name, getattr(application, value) if isinstance(value, str) else value)
    answer = await probe(application)
    assert (answer.status_code, answer.json()["status"]) == (503, status)
    assert answer.json()["reason"]
    assert "boom" not in answer.text


async def test_a_full_queue_is_no_fault(application, warm, tokens):
    async def others_first():
        tokens.inc(5)
        await asyncio.Event().wait()

    application.answer = others_first
    answer = await probe(application)
    assert (answer.status_code, answer.json()["status"]) == (200, "busy")


async def test_an_engine_that_dies_meanwhile_is_dead(application):
    async def dying():
        application.engine.errored = True
        return 500

    application.answer = dying
    assert (await probe(application)).json()["status"] == "dead"


async def test_a_dead_engine_is_not_ready_a_moment_longer_and_gets_no_more_requests(application, caplog_vllm):
    async with client_of(around(application), application) as client:
        assert (await client.get("/readyz")).json()["status"] == "ready"
        ended = {}
        manager = SimpleNamespace(finished_procs=lambda: ended)
        application.engine.engine_core = SimpleNamespace(resources=SimpleNamespace(engine_manager=manager))
        assert (await client.get("/readyz")).json()["status"] == "ready"
        ended |= {"EngineCore_DP0": -15, "EngineCore_DP1": -9}  # which vLLM is about to notice
        assert (await client.get("/readyz")).json()["status"] == "dead"
        asked = len(application.asked)
        refused = [await client.post("/v1/completions") for _ in range(2)]
    assert [answer.status_code for answer in refused] == [503, 503]
    assert int(refused[0].headers["retry-after"]) > 0
    assert refused[0].json()["error"]["code"] == 503
    assert len(application.asked) == asked
    assert len(caplog_vllm) == 2
    assert exit_cause(caplog_vllm, oom_killed=False) == "process EngineCore_DP1 was killed by SIGKILL"


@pytest.fixture
def caplog_vllm():
    """Messages of the server's own log."""
    with messages_of(health.logger) as messages:
        yield messages


async def test_a_late_completion_is_withdrawn(application, warm):
    withdrawn = asyncio.Event()

    async def late():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            withdrawn.set()
            raise

    application.answer = late
    await probe(application)
    await asyncio.wait_for(withdrawn.wait(), 1)


async def test_probes_do_not_pile_up(application, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(health, "time", SimpleNamespace(monotonic=lambda: now[0]))
    async with client_of(around(application), application) as client:
        answers = await asyncio.gather(*(client.get("/readyz") for _ in range(50)))
        assert {answer.status_code for answer in answers} == {200}
        assert len(application.asked) == 1
        await client.get("/readyz")
        assert len(application.asked) == 1  # it stands for a while
        now[0] += health.KEPT
        application.answer = application.refused
        assert (await client.get("/readyz")).status_code == 503
        assert len(application.asked) == 2


async def test_one_who_hangs_up_does_not_take_the_answer_from_the_others(application):
    go_on = asyncio.Event()

    async def held():
        await go_on.wait()
        return 200

    application.answer = held
    async with client_of(around(application), application) as client:
        first, second = asyncio.create_task(client.get("/readyz")), asyncio.create_task(client.get("/readyz"))
        await asyncio.sleep(TIMEOUT / 10)
        first.cancel()
        await asyncio.wait([first])
        go_on.set()
        assert (await second).status_code == 200
    assert len(application.asked) == 1


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
async def test_probes_pass_by_the_layer_that_wants_the_key(application, monkeypatch, path):
    async def locked(scope, receive, send):
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    monkeypatch.setenv("VLLM_API_KEY", "secret")
    async with client_of(Health(locked, bare=application), application) as client:
        assert (await client.get(path)).status_code == 200
        assert (await client.post(path)).status_code == 405
        assert (await client.get(path + "/x")).status_code == 401
    # vLLM's own layer asks for that key, too.
    assert all(headers[b"authorization"] == b"Bearer secret" for headers in application.asked)


async def test_alive_is_cheap(application):
    application.answer = application.never
    answer = await probe(application, "/livez")
    assert (answer.status_code, answer.json()) == (200, {"status": "alive"})
    application.engine.errored = True
    assert (await probe(application, "/livez")).status_code == 503
    assert application.asked == []


@pytest.fixture
def vllms_signals():
    """What vLLM sets before our middleware sees the server start; `told` when it is told to stop."""
    told = asyncio.Event()

    def set_up():
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, told.set)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield SimpleNamespace(told=told, set_up=set_up)
    for number, handler in handlers.items():
        signal.signal(number, handler)


async def start(middleware, application):
    await middleware({"type": "lifespan", "app": application}, None, None)


async def test_a_drain_waits_for_what_is_under_way(application, vllms_signals):
    go_on = asyncio.Event()

    async def long():
        await go_on.wait()
        return 200

    vllms_signals.set_up()
    middleware = around(application)
    await start(middleware, application)
    application.answer = long
    async with client_of(middleware, application) as client:
        under_way = asyncio.create_task(client.post("/v1/completions"))
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.2)
        refused = await client.post("/v1/completions")
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert refused.headers["connection"] == "close"
        assert refused.json()["error"]["code"] == 503
        assert (await client.get("/readyz")).json()["status"] == "draining"
        assert (await client.get("/livez")).status_code == 200
        assert not vllms_signals.told.is_set()
        go_on.set()
        assert (await under_way).status_code == 200
        await asyncio.wait_for(vllms_signals.told.wait(), 2)


async def test_a_drain_ends_with_its_grace(application, vllms_signals, monkeypatch):
    monkeypatch.setenv("HUNYUAN_VLLM_DRAIN_GRACE", "1")
    vllms_signals.set_up()
    middleware = around(application)
    await start(middleware, application)
    application.answer = application.never
    async with client_of(middleware, application) as client:
        under_way = asyncio.create_task(client.post("/v1/completions"))
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.15)
        assert not vllms_signals.told.is_set()
        await asyncio.wait_for(vllms_signals.told.wait(), 2)
        under_way.cancel()


async def test_a_websocket_is_refused_while_draining(application, vllms_signals):
    vllms_signals.set_up()
    middleware = around(application)
    await start(middleware, application)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.05)
    sent = []

    async def send(message):
        sent.append(message)

    await middleware({"type": "websocket", "path": "/v1/realtime", "headers": []}, None, send)
    assert sent == [{"type": "websocket.close", "code": 1012}]
    await asyncio.wait_for(vllms_signals.told.wait(), 2)


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf"])
def test_a_time_that_is_none_is_refused(application, monkeypatch, value):
    monkeypatch.setenv("HUNYUAN_VLLM_DRAIN_GRACE", value)
    with pytest.raises(UserError, match=f"HUNYUAN_VLLM_DRAIN_GRACE={value} is not a number of seconds"):
        around(application)


def test_restarts_are_a_metric():
    registry = CollectorRegistry()
    export_restarts(None, registry)
    assert generate_latest(registry) == b""
    export_restarts(3, registry)
    assert b"\nhunyuan_supervisor_restarts_total 3.0\n" in generate_latest(registry)


def test_restarts_are_a_metric_of_several_api_servers_too(tmp_path):
    """As vLLM scrapes them: each process writes its metrics into files, and one reads them all."""
    one = "from hunyuan_vllm.server.middleware.health import export_restarts; export_restarts(3)"
    for _ in range(2):
        done = forked_programs.run([sys.executable, "-c", one], {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)})
        assert done.returncode == 0, done.stderr
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))
    assert b"\nhunyuan_supervisor_restarts_total 3.0\n" in generate_latest(registry)
