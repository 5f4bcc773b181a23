"""The layers around vLLM's application, as one class (vLLM warns of a second --middleware): without a key, and with."""

from __future__ import annotations

import os

from hunyuan_vllm.server.asgi import App, Receive, Scope, Send
from hunyuan_vllm.server.auth import RequireApiKey
from hunyuan_vllm.server.chat_page import ChatPage
from hunyuan_vllm.server.keys import KeyRing
from hunyuan_vllm.server.lifecycle import LIVE, READY, Lifecycle
from hunyuan_vllm.server.limits import Limits
from hunyuan_vllm.server.metrics import OwnMetrics
from hunyuan_vllm.server.name_fields import NameFields
from hunyuan_vllm.server.request_log import RequestLog
from hunyuan_vllm.server.routes import AllowedRoutes
from hunyuan_vllm.server.surface import Surface

__all__ = ["BehindKey", "Open"]

QUIET = ("/health", LIVE, READY, "/metrics")


class Open:
    """For a server that needs no key."""

    def __init__(self, app: App) -> None:
        self._app = _around(app, None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class BehindKey:
    """For a server whose every path needs a key, probes and the chat page apart."""

    def __init__(self, app: App) -> None:
        self._app = _around(app, KeyRing(os.environ))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _around(app: App, keys: KeyRing | None) -> App:
    surface = Surface.read(os.environ)
    served: App = OwnMetrics(Limits(NameFields(app), surface))
    served = AllowedRoutes(served, surface.extra_routes, surface.admin)
    guarded = RequireApiKey(served, keys) if keys is not None else served
    return RequestLog(Lifecycle(ChatPage(guarded), bare=app), QUIET)
