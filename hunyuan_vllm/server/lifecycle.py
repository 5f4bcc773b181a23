"""ASGI middleware with what an operator needs of a server: /livez, /readyz, and an orderly end.

It lies outside the layer that asks for the key: those who probe have none. The answers tell nothing else.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from vllm.logger import init_logger

from hunyuan_vllm import envs
from hunyuan_vllm.server.asgi import App, Receive, Scope, Send, refuse
from hunyuan_vllm.server.cause import ENGINE_DIED
from hunyuan_vllm.server.drain import Drain
from hunyuan_vllm.server.readiness import DEAD, Readiness, exit_codes, has_ended
from hunyuan_vllm.server.restarts import export_restarts
from hunyuan_vllm.server.verdict import Verdict

__all__ = ["Lifecycle"]

logger = init_logger(f"vllm.{__name__}")  # vLLM configures only loggers below its own name
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
