"""/livez, /readyz and the drain"""

import asyncio
import json
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import httpx
from prometheus_client import REGISTRY, CollectorRegistry, Gauge
from vllm.logger import init_logger
from vllm.v1.engine.exceptions import EngineDeadError

from hunyuan_vllm import envs
from hunyuan_vllm.server.exit_cause import ENGINE_DIED
from hunyuan_vllm.server.middleware.asgi import App, Header, Receive, Scope, Send, refuse, respond
from hunyuan_vllm.server.readiness import HealthStatus


def export_restarts(count: int | None, registry: CollectorRegistry = REGISTRY) -> None:
    """Export hunyuan_supervisor_restarts_total in /metrics; nothing without a supervisor (None)."""
    if count is not None:
        # Several API servers export the same value, and a counter would be their sum.
        name, text = "hunyuan_supervisor_restarts_total", "Restarts of the server by its supervisor"
        Gauge(name, text, registry=registry, multiprocess_mode="max").set(count)


ENGINE_LOGGER = "vllm.v1.engine.async_llm"
logger = init_logger(f"vllm.{__name__}")  # vLLM configures only loggers below its own name


def _not_engine_dead(record: logging.LogRecord) -> bool:
    """When it stops, vLLM kills its engine and then reports with a traceback that it is dead."""
    return not (record.exc_info and isinstance(record.exc_info[1], EngineDeadError))


KEPT = 1.0  # seconds for which a status is reused, so that any number of probes costs one completion
REQUEST = {"prompt": "1", "max_tokens": 1, "temperature": 0}
WARM_UP: tuple[dict[str, Any], ...] = (
    {"prompt": "1 2 3", "max_tokens": 1, "temperature": 0, "logprobs": 1, "prompt_logprobs": 1},
    {"prompt": "1", "max_tokens": 1, "temperature": 1, "top_p": 0.9, "top_k": 10, "min_p": 0.01},
    {"prompt": "1", "max_tokens": 1, "temperature": 1, "structured_outputs": {"choice": ["1"]}},
)
TOKENS = "vllm:generation_tokens_total"
DEAD = HealthStatus("dead", "the engine has ended")


class Readiness:
    """Checks by generating a token, once for all probes that arrive meanwhile."""

    def __init__(self, app: App, timeout: float) -> None:
        """Args:
        app: vLLM's application, without our middleware, which requires a key.
        timeout: seconds that the token may take.
        """
        self._app = app
        self._timeout = timeout
        self._warm_up: asyncio.Task[None] | None = None
        self._status: HealthStatus | None = None
        self._valid_until = 0.0
        self._check: asyncio.Task[HealthStatus] | None = None

    async def status(self, scope: Scope) -> HealthStatus:
        """The status, at most KEPT seconds old. `scope` is that of a request to the same application."""
        if has_ended(scope["app"].state.engine_client):
            return DEAD
        if self._status is not None and time.monotonic() < self._valid_until:
            return self._status
        if self._check is None or self._check.done():
            self._check = asyncio.create_task(self._update(scope["app"]))
        return await asyncio.shield(self._check)  # the first probe may disconnect while others wait

    async def _update(self, application: Any) -> HealthStatus:
        self._status = await self._measure(application)
        self._valid_until = time.monotonic() + KEPT
        return self._status

    async def _measure(self, application: Any) -> HealthStatus:
        engine = application.state.engine_client
        if self._warm_up is None:
            self._warm_up = asyncio.create_task(self._send_warm_up(application))
        await asyncio.wait({self._warm_up}, timeout=self._timeout)
        if has_ended(engine):
            return DEAD
        if not self._warm_up.done():
            return HealthStatus("warming", "the engine is warming up")
        tokens = _tokens_generated()
        completion = asyncio.create_task(self._complete(application))
        # Answered between two steps of the engine, without waiting for a place in the batch as the completion does.
        step = asyncio.create_task(_succeeds_after(self._timeout / 2, engine.is_sleeping))
        await asyncio.wait({completion}, timeout=self._timeout)
        stepping = step.done() and step.result()
        for task in (completion, step):
            task.cancel()  # which also aborts the request
        if has_ended(engine):
            return DEAD
        if completion.done():
            status = completion.result()
            failed = status != httpx.codes.OK
            return HealthStatus("failed", f"a completion returned {status}") if failed else HealthStatus("ready")
        late = f"no token within {self._timeout:g} s"
        if _tokens_generated() > tokens:
            return HealthStatus("busy", f"{late}, but other requests got theirs")
        if stepping:
            return HealthStatus("slow", f"{late} for any request, but the engine makes progress")
        return HealthStatus("stalled", f"{late} for any request, and the engine makes no progress")

    async def _send_warm_up(self, application: Any) -> None:
        """Send the warm-up requests. One that is refused, as with --max-logprobs 0, is refused to users too."""
        # vLLM spreads prompts evenly over idle engines.
        engines = application.state.engine_client.vllm_config.parallel_config.data_parallel_size
        async with self._client(application) as client:
            for request in WARM_UP:
                with suppress(Exception):
                    prompts = [request["prompt"]] * engines
                    await client.post("/v1/completions", json={**request, "prompt": prompts})

    async def _complete(self, application: Any) -> int | str:
        """Request the token; the answer's status."""
        async with self._client(application) as client:
            try:
                return (await client.post("/v1/completions", json=REQUEST)).status_code
            except Exception:
                return "no answer"

    def _client(self, application: Any) -> httpx.AsyncClient:
        async def within(scope: Scope, receive: Receive, send: Send) -> None:
            await self._app({**scope, "app": application}, receive, send)

        # If this key is set, vLLM checks it itself.
        key = os.environ.get("VLLM_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        transport = httpx.ASGITransport(app=within)
        return httpx.AsyncClient(transport=transport, base_url="http://readyz", headers=headers)


def has_ended(engine: Any) -> bool:
    """Whether the engine has ended: as vLLM reports it, or a moment earlier as its processes show."""
    return engine.errored or bool(exit_codes(engine))


def exit_codes(engine: Any) -> dict[str, int]:
    """Of the engine's processes that have ended, by name; unknown in one of several API servers, and over Ray."""
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
    """Tokens of all requests since the start, as vLLM counts them; 0 if its statistics are disabled."""
    families = REGISTRY.restricted_registry([TOKENS]).collect()
    return sum(sample.value for family in families for sample in family.samples if sample.name == TOKENS)


LIVE, READY = "/livez", "/readyz"
WHILE_DRAINING = {"/metrics"}
DRAINING = HealthStatus("draining", "the server is about to stop")
RETRY_AFTER = b"10"  # seconds, in which another replica takes over or this one restarts


class Health:
    """Answers probes; refuses requests while the server drains and once its engine has died.

    It handles SIGTERM instead of vLLM, which would cut off the requests in flight.
    """

    def __init__(self, app: App, bare: App) -> None:
        """Args:
        app: the application with the other middleware.
        bare: vLLM's application, which generates the token for /readyz.
        """
        self._app = app
        self._readiness = Readiness(bare, envs.ready_timeout())
        self._grace = envs.drain_grace()
        self._in_flight = 0
        self._draining: asyncio.Task[None] | None = None
        self._death_logged = False
        export_restarts(envs.supervisor_restarts())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            # By now vLLM has set its own handlers for SIGTERM and SIGINT.
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._begin_drain)
            engine = _engine(scope)  # vLLM deletes its state when it stops
            await self._app(scope, receive, send)
            self._has_died(engine)  # logs it, even if no request has noticed
        elif scope["type"] == "http" and scope["path"] in (LIVE, READY):
            await self._probe(scope, send)
        elif self._draining and scope["path"] not in WHILE_DRAINING:
            await _refuse(scope, send, DRAINING)
        elif self._has_died(_engine(scope)):
            await _refuse(scope, send, DEAD)
        else:
            self._in_flight += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._in_flight -= 1

    def _begin_drain(self) -> None:
        self._draining = self._draining or asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        """Let requests finish for the time they have, then stop the server."""
        logger.info("Draining: %d requests in flight have %g s to finish", self._in_flight, self._grace)
        deadline = time.monotonic() + self._grace
        while self._in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        if self._in_flight:
            logger.warning("Draining: %d requests took too long and are aborted", self._in_flight)
        else:
            logger.info("Draining: all requests have finished")
        logging.getLogger(ENGINE_LOGGER).addFilter(_not_engine_dead)
        os.kill(os.getpid(), signal.SIGINT)  # whose handler is still vLLM's, the same as for SIGTERM

    async def _probe(self, scope: Scope, send: Send) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            await _answer(send, HTTPStatus.METHOD_NOT_ALLOWED, {"status": "GET or HEAD only"}, (b"allow", b"GET, HEAD"))
        elif scope["path"] == LIVE:
            dead = self._has_died(_engine(scope))
            status = HTTPStatus.SERVICE_UNAVAILABLE if dead else HTTPStatus.OK
            await _answer(send, status, {"status": "dead" if dead else "alive"})
        else:
            health = DRAINING if self._draining else await self._readiness.status(scope)
            status = HTTPStatus.OK if health.ready else HTTPStatus.SERVICE_UNAVAILABLE
            await _answer(send, status, {"status": health.status, "reason": health.reason})

    def _has_died(self, engine: Any) -> bool:
        """Whether the engine has ended by itself; logs once the exit code of its process, which vLLM does not."""
        if self._draining or engine is None or not has_ended(engine):
            return False
        if not self._death_logged:
            for name, code in exit_codes(engine).items():
                logger.error(ENGINE_DIED, name, code)
                self._death_logged = True
        return True


def _engine(scope: Scope) -> Any:
    return getattr(getattr(scope["app"], "state", None), "engine_client", None)


async def _refuse(scope: Scope, send: Send, health: HealthStatus) -> None:
    headers = [(b"retry-after", RETRY_AFTER), (b"connection", b"close")]
    await refuse(scope, send, HTTPStatus.SERVICE_UNAVAILABLE, health.reason, headers=headers)


async def _answer(send: Send, status: HTTPStatus, content: dict[str, object], *headers: Header) -> None:
    await respond(send, status, json.dumps(content).encode(), [(b"cache-control", b"no-store"), *headers])
