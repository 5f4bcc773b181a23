"""All middleware, in order, as one class (vLLM warns of a second --middleware): without a key, and with one"""

import os
from argparse import Namespace
from http import HTTPStatus

from hunyuan_vllm.server.keys import KeyRing
from hunyuan_vllm.server.middleware.access_log import AccessLog
from hunyuan_vllm.server.middleware.asgi import App, Receive, Scope, Send, refuse, without_prefix
from hunyuan_vllm.server.middleware.auth import RequireApiKey
from hunyuan_vllm.server.middleware.errors import ErrorHandler
from hunyuan_vllm.server.middleware.health import LIVE, READY, Health
from hunyuan_vllm.server.middleware.limits import Limits
from hunyuan_vllm.server.middleware.metrics import METRICS, Metrics
from hunyuan_vllm.server.middleware.page import ChatPage
from hunyuan_vllm.server.middleware.routes import AllowedRoutes
from hunyuan_vllm.server.options import ApiPolicy
from hunyuan_vllm.util.net import is_loopback

PROBES = ("/health", LIVE, READY, METRICS)


def build(app: App, keys: KeyRing | None) -> App:
    """The middleware around vLLM's application, from the inside out."""
    from hunyuan_vllm.patches import name_reasoning_as_before  # imports vLLM, which is there by now

    name_reasoning_as_before()
    policy = ApiPolicy.read(os.environ)
    served: App = ErrorHandler(app)
    served = Limits(served, policy)
    served = Metrics(served)
    served = AllowedRoutes(served, policy.extra_routes, policy.admin)
    if keys is not None:
        served = RequireApiKey(served, keys)
    served = ChatPage(served)
    served = Health(served, bare=app)
    return AccessLog(served, quiet=PROBES)


class BehindKey:
    """For a server whose every path needs a key, except probes and the chat page."""

    def __init__(self, app: App) -> None:
        self._app = build(app, KeyRing(os.environ))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(without_prefix(scope), receive, send)


class Open:
    """For a server that needs no key. It refuses to start if other machines could reach it without --insecure.

    The launcher has checked that already; this checks the arguments as vLLM itself has parsed them.
    """

    def __init__(self, app: App) -> None:
        self._app = build(app, None)
        self._insecure = ApiPolicy.read(os.environ).insecure
        self._problem: str | None = None
        self._checked = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._checked:
            self._problem = None if self._insecure else _exposure(scope["app"].state.args)
            self._checked = True
        if self._problem is None:
            await self._app(without_prefix(scope), receive, send)
        elif scope["type"] == "lifespan":
            # Before it listens. After an exception, uvicorn would go on without the lifespan.
            await receive()
            await send({"type": "lifespan.startup.failed", "message": f"PermissionError: {self._problem}"})
        else:
            await refuse(scope, send, HTTPStatus.SERVICE_UNAVAILABLE, self._problem)


def _exposure(args: Namespace) -> str | None:
    """Why a server with these arguments must not be served without a key; None if only this machine reaches it."""
    if args.uds or (args.host and is_loopback(args.host)):
        return None
    return f"the server would listen on {args.host or 'every address'} without an API key (--insecure permits it)"
