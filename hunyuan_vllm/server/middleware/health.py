"""/livez, /readyz and the drain"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from typing import Any

import httpx
from prometheus_client import REGISTRY, CollectorRegistry, Gauge
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector
from vllm.logger import init_logger
from vllm.v1.engine.exceptions import EngineDeadError

from hunyuan_vllm import envs
from hunyuan_vllm.server.health_status import ENGINE_DIED, Verdict
from hunyuan_vllm.server.middleware.asgi import App, Receive, Scope, Send, refuse
from hunyuan_vllm.server.middleware.counters import are_shared

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


REPORTS_DEATHS = "vllm.v1.engine.async_llm"  # a logger
logger = init_logger(f"vllm.{__name__}")  # vLLM configures only loggers below its own name


class Drain:
    """Counts the requests under way, and takes SIGTERM from vLLM, which would end them.

    Attributes:
        draining: no new request is to be taken.
    """

    def __init__(self, grace: float) -> None:
        """`grace` is how long, in seconds, requests may go on after SIGTERM."""
        self.draining = False
        self._grace = grace
        self._under_way = 0
        self._ending: asyncio.Task[None] | None = None

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around a request, from its first byte to the last byte of its answer."""
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    def take_sigterm(self) -> None:
        """Drain on SIGTERM. Call it in the event loop, after vLLM has set its own handlers for SIGTERM and SIGINT."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._begin)

    def _begin(self) -> None:
        if not self.draining:
            self.draining = True
            self._ending = asyncio.create_task(self._end())

    async def _end(self) -> None:
        logger.info("Draining: %d requests under way have %g s to finish", self._under_way, self._grace)
        deadline = time.monotonic() + self._grace
        while self._under_way and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        if self._under_way:
            logger.warning("Draining: %d requests took too long and are cut off", self._under_way)
        else:
            logger.info("Draining: all requests have finished")
        logging.getLogger(REPORTS_DEATHS).addFilter(_is_no_death)
        os.kill(os.getpid(), signal.SIGINT)  # for which vLLM's own handler, the same as for SIGTERM, is still there


def _is_no_death(record: logging.LogRecord) -> bool:
    """vLLM kills its engine as it stops, and then reports, with a traceback, that it is dead."""
    return not (record.exc_info and isinstance(record.exc_info[1], EngineDeadError))


KEPT = 1.0  # seconds for which an answer stands, so that probes cost one completion however many there are
REQUEST = {"prompt": "1", "max_tokens": 1, "temperature": 0}
WARM_UP: tuple[dict[str, Any], ...] = (
    {"prompt": "1 2 3", "max_tokens": 1, "temperature": 0, "logprobs": 1, "prompt_logprobs": 1},
    {"prompt": "1", "max_tokens": 1, "temperature": 1, "top_p": 0.9, "top_k": 10, "min_p": 0.01},
    {"prompt": "1", "max_tokens": 1, "temperature": 1, "structured_outputs": {"choice": ["1"]}},
)
TOKENS = "vllm:generation_tokens_total"
DEAD = Verdict("dead", "the engine has ended")


class Readiness:
    """Asks the application for a token when somebody wants to know, once for all who want to know at that time."""

    def __init__(self, app: App, timeout: float) -> None:
        """Args:
        app: vLLM's application, without the layers that ask for our key.
        timeout: seconds that the token may take.
        """
        self._app = app
        self._timeout = timeout
        self._warm_ups = list(WARM_UP)
        self._verdict: Verdict | None = None
        self._until = 0.0
        self._asking: asyncio.Task[Verdict] | None = None

    async def verdict(self, scope: Scope) -> Verdict:
        """The answer, at most KEPT seconds old. `scope` is that of a request to the same application."""
        if has_ended(scope["app"].state.engine_client):
            return DEAD
        if self._verdict is not None and time.monotonic() < self._until:
            return self._verdict
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask(scope["app"]))
        return await asyncio.shield(self._asking)  # whoever asked first may hang up: the others still want to know

    async def _ask(self, application: Any) -> Verdict:
        self._verdict = await self._judge(application)
        self._until = time.monotonic() + KEPT
        return self._verdict

    async def _judge(self, application: Any) -> Verdict:
        engine = application.state.engine_client
        tokens, warm = _tokens_generated(), not self._warm_ups
        completion = asyncio.create_task(self._complete(application))
        # Answered between two steps of the engine: unlike the completion it need not wait for a place in the batch.
        step = asyncio.create_task(_succeeds_after(self._timeout / 2, engine.is_sleeping))
        await asyncio.wait({completion}, timeout=self._timeout)
        stepping = step.done() and step.result()
        for task in (completion, step):
            task.cancel()  # which withdraws the request, too
        if has_ended(engine):
            return DEAD
        if completion.done():
            status = completion.result()
            return Verdict("ready") if status == httpx.codes.OK else Verdict("failed", f"a completion gave {status}")
        late = f"no token within {self._timeout:g} s"
        if not warm:  # where tokens may be those of the requests that warm it up
            return Verdict("warming", "the engine prepares what requests use first")
        if _tokens_generated() > tokens:
            return Verdict("busy", f"{late}, but other requests got theirs")
        if stepping:
            return Verdict("slow", f"{late} for any request, but the engine is at work")
        return Verdict("stalled", f"{late} for any request, and the engine does not move")

    async def _complete(self, application: Any) -> int | str:
        """Ask for the token, after what is left of the warm-up, and return the answer's status."""

        async def within(scope: Scope, receive: Receive, send: Send) -> None:
            await self._app({**scope, "app": application}, receive, send)

        # vLLM itself asks for this key where it is set, in a layer further in.
        key = os.environ.get("VLLM_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        transport = httpx.ASGITransport(app=within)
        async with httpx.AsyncClient(transport=transport, base_url="http://readyz", headers=headers) as client:
            while self._warm_ups:
                # One that is not answered in time is withdrawn here, and asked again by the next probe. A server that
                # refuses one, as with --max-logprobs 0, refuses its users' too.
                with suppress(Exception):
                    await client.post("/v1/completions", json=self._on_all_engines(application, self._warm_ups[0]))
                self._warm_ups.pop(0)
            try:
                return (await client.post("/v1/completions", json=REQUEST)).status_code
            except Exception:
                return "no answer"

    @staticmethod
    def _on_all_engines(application: Any, request: dict[str, Any]) -> dict[str, Any]:
        """The request with a prompt for each engine: vLLM spreads prompts evenly over those that are equally free."""
        engines = application.state.engine_client.vllm_config.parallel_config.data_parallel_size
        return {**request, "prompt": [request["prompt"]] * engines}


def has_ended(engine: Any) -> bool:
    """Whether vLLM's engine client has lost its engine; seen by the processes, too, a moment before vLLM says so."""
    return engine.errored or bool(exit_codes(engine))


def exit_codes(engine: Any) -> dict[str, int]:
    """Of the engine's processes that have ended, by name; none are known in one of several API servers, or over Ray."""
    resources = getattr(getattr(engine, "engine_core", None), "resources", None)
    finished = getattr(getattr(resources, "engine_manager", None), "finished_procs", None)
    return finished() if finished else {}


async def _succeeds_after(delay: float, call: Callable[[], Awaitable[object]]) -> bool:
    await asyncio.sleep(delay)
    try:
        await call()
    except Exception:
        return False
    return True


def _tokens_generated() -> float:
    """Tokens of all requests since the start, as vLLM counts them; 0 where its statistics are switched off."""
    families = REGISTRY.restricted_registry([TOKENS]).collect()
    return sum(sample.value for family in families for sample in family.samples if sample.name == TOKENS)


LIVE, READY = "/livez", "/readyz"
WHILE_DRAINING = {"/metrics"}  # how a drain goes is worth seeing
DRAINING = Verdict("draining", "the server is about to stop")
RETRY_AFTER = b"10"  # seconds: another replica has taken over by then, or this one may be on its way back


class Lifecycle:
    """Answers probes; once the server is told to stop, or its engine has died, refuses requests until it ends."""

    def __init__(self, app: App, bare: App) -> None:
        """Args:
        app: what is to be served.
        bare: the same without our layers, to ask for the token that /readyz wants to see.
        """
        self._app = app
        self._readiness = Readiness(bare, envs.ready_timeout())
        self._drain = Drain(envs.drain_grace())
        self._death_logged = False
        export_restarts(envs.supervisor_restarts())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._drain.take_sigterm()
            engine = _engine(scope)  # vLLM deletes its state in the end
            await self._app(scope, receive, send)
            self._has_died(engine)  # which is worth a line even where nobody asked meanwhile
        elif scope["type"] == "http" and scope["path"] in (LIVE, READY):
            await self._probe(scope, send)
        elif self._drain.draining and scope["path"] not in WHILE_DRAINING:
            await _refuse(scope, send, DRAINING)
        elif self._has_died(_engine(scope)):
            await _refuse(scope, send, DEAD)
        else:
            with self._drain.request():
                await self._app(scope, receive, send)

    async def _probe(self, scope: Scope, send: Send) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            await _answer(send, HTTPStatus.METHOD_NOT_ALLOWED, {"status": "probes are GET"}, [(b"allow", b"GET, HEAD")])
        elif scope["path"] == LIVE:
            dead = self._has_died(_engine(scope))
            status = HTTPStatus.SERVICE_UNAVAILABLE if dead else HTTPStatus.OK
            await _answer(send, status, {"status": "dead" if dead else "alive"})
        else:
            verdict = DRAINING if self._drain.draining else await self._readiness.verdict(scope)
            status = HTTPStatus.OK if verdict.ready else HTTPStatus.SERVICE_UNAVAILABLE
            await _answer(send, status, {"status": verdict.status, "reason": verdict.reason})

    def _has_died(self, engine: Any) -> bool:
        """Whether the engine has ended unasked; the log says once how its process did, which vLLM does not."""
        if self._drain.draining or engine is None or not has_ended(engine):
            return False
        if not self._death_logged:
            for name, code in exit_codes(engine).items():
                logger.error(ENGINE_DIED, name, code)
                self._death_logged = True
        return True


def _engine(scope: Scope) -> Any:
    return getattr(getattr(scope["app"], "state", None), "engine_client", None)


async def _refuse(scope: Scope, send: Send, verdict: Verdict) -> None:
    headers = [(b"retry-after", RETRY_AFTER), (b"connection", b"close")]
    await refuse(scope, send, HTTPStatus.SERVICE_UNAVAILABLE, verdict.reason, headers=headers)


async def _answer(
    send: Send, status: HTTPStatus, content: dict[str, object], headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    body = json.dumps(content).encode()
    own = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": own + (headers or [])})
    await send({"type": "http.response.body", "body": body})
