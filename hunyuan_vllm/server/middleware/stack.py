"""The layers around vLLM's application, as one class (vLLM warns of a second --middleware): without a key, and with."""

from __future__ import annotations

import os
from argparse import Namespace
from http import HTTPStatus

from hunyuan_vllm.server.keys import KeyRing
from hunyuan_vllm.server.middleware.access_log import RequestLog
from hunyuan_vllm.server.middleware.asgi import App, Receive, Scope, Send, refuse, without_prefix
from hunyuan_vllm.server.middleware.auth import RequireApiKey
from hunyuan_vllm.server.middleware.errors import NameFields
from hunyuan_vllm.server.middleware.health import LIVE, READY, Lifecycle
from hunyuan_vllm.server.middleware.limits import Limits
from hunyuan_vllm.server.middleware.metrics import OwnMetrics
from hunyuan_vllm.server.middleware.page import ChatPage
from hunyuan_vllm.server.middleware.routes import AllowedRoutes, OneModel
from hunyuan_vllm.server.options import Surface
from hunyuan_vllm.util.net import is_loopback

QUIET = ("/health", LIVE, READY, "/metrics")


class Open:
    """For a server that needs no key. It does not start where other machines could reach it without --insecure.

    The launch has checked that already; this checks it again, by the arguments that vLLM itself has parsed.
    """

    def __init__(self, app: App) -> None:
        self._app = _around(app, None)
        self._may_be_reached = Surface.read(os.environ).insecure
        self._problem: str | None = None
        self._checked = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._checked:
            self._problem = None if self._may_be_reached else _exposure(scope["app"].state.args)
            self._checked = True
        if self._problem is None:
            await self._app(without_prefix(scope), receive, send)
        elif scope["type"] == "lifespan":
            # Before it listens. An exception would have the server go on without the lifespan.
            await receive()
            await send({"type": "lifespan.startup.failed", "message": f"PermissionError: {self._problem}"})
        else:
            await refuse(scope, send, HTTPStatus.SERVICE_UNAVAILABLE, self._problem)


class BehindKey:
    """For a server whose every path needs a key, probes and the chat page apart."""

    def __init__(self, app: App) -> None:
        self._app = _around(app, KeyRing(os.environ))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(without_prefix(scope), receive, send)


def _exposure(args: Namespace) -> str | None:
    """Why a server with these arguments is not to be served without a key; None if only this machine reaches it."""
    if args.uds or (args.host and is_loopback(args.host)):
        return None
    return f"the server would listen on {args.host or 'every address'} and ask for no API key (--insecure permits it)"


def _around(app: App, keys: KeyRing | None) -> App:
    surface = Surface.read(os.environ)
    served: App = OwnMetrics(Limits(NameFields(OneModel(app)), surface))
    served = AllowedRoutes(served, surface.extra_routes, surface.admin)
    guarded = RequireApiKey(served, keys) if keys is not None else served
    return RequestLog(Lifecycle(ChatPage(guarded), bare=app), QUIET)
