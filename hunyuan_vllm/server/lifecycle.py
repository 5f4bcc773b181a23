"""ASGI middleware with what an operator needs of a server: /livez, /readyz, and an orderly end.

It lies outside the layer that asks for the key: those who probe have none. The answers tell nothing else.
"""

from __future__ import annotations

import json
from http import HTTPStatus

from hunyuan_vllm import envs
from hunyuan_vllm.server.asgi import App, Receive, Scope, Send, inner_path
from hunyuan_vllm.server.drain import Drain
from hunyuan_vllm.server.readiness import Readiness
from hunyuan_vllm.server.restarts import export_restarts
from hunyuan_vllm.server.verdict import Verdict

__all__ = ["Lifecycle"]

LIVE, READY = "/livez", "/readyz"
WHILE_DRAINING = {"/metrics"}  # how a drain goes is worth seeing
DRAINING = Verdict("draining", "the server is about to stop")
RETRY_AFTER = b"10"  # seconds: another replica has taken over by then, or this one may be on its way back


class Lifecycle:
    """Answers probes; once the server is told to stop, refuses requests until those under way have finished."""

    def __init__(self, app: App, bare: App) -> None:
        """Args:
        app: what is to be served.
        bare: the same without our layers, to ask for the token that /readyz wants to see.
        """
        self._app = app
        self._readiness = Readiness(bare, envs.ready_timeout())
        self._drain = Drain(envs.drain_grace())
        export_restarts(envs.supervisor_restarts())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._drain.take_sigterm()
            await self._app(scope, receive, send)
        elif scope["type"] == "http" and inner_path(scope) in (LIVE, READY):
            await self._probe(scope, send)
        elif self._drain.draining and inner_path(scope) not in WHILE_DRAINING:
            await _refuse(scope, send)
        else:
            with self._drain.request():
                await self._app(scope, receive, send)

    async def _probe(self, scope: Scope, send: Send) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            await _answer(send, HTTPStatus.METHOD_NOT_ALLOWED, {"status": "probes are GET"}, [(b"allow", b"GET, HEAD")])
        elif inner_path(scope) == LIVE:
            dead = scope["app"].state.engine_client.errored and not self._drain.draining
            status = HTTPStatus.SERVICE_UNAVAILABLE if dead else HTTPStatus.OK
            await _answer(send, status, {"status": "dead" if dead else "alive"})
        else:
            verdict = DRAINING if self._drain.draining else await self._readiness.verdict(scope)
            status = HTTPStatus.OK if verdict.ready else HTTPStatus.SERVICE_UNAVAILABLE
            await _answer(send, status, {"status": verdict.status, "reason": verdict.reason})


async def _refuse(scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1012})  # "service restart"
        return
    status = HTTPStatus.SERVICE_UNAVAILABLE
    error = {"message": DRAINING.reason, "type": status.phrase, "param": None, "code": status}
    await _answer(send, status, {"error": error}, [(b"retry-after", RETRY_AFTER), (b"connection", b"close")])


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
