"""ASGI middleware that asks for an API key on every path.

vLLM's own --api-key leaves paths such as /invocations, /tokenize and /pause open, and is there for `ps` to read.
"""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus

from vllm.logger import init_logger

from hunyuan_vllm.server.asgi import App, Receive, Scope, Send, inner_path, notes, refuse
from hunyuan_vllm.server.keys import KeyRing
from hunyuan_vllm.server.refusals import count_refusal
from hunyuan_vllm.server.routes import KEYLESS, Paths

__all__ = ["RequireApiKey"]

logger = init_logger(f"vllm.{__name__}")  # vLLM configures only loggers below its own name
SCHEME = b"bearer "


class RequireApiKey:
    """Answers 401 to a request without `Authorization: Bearer KEY`, the same for every reason.

    Open are CORS preflights (OPTIONS), which browsers send without credentials, and to be read the keyless paths.
    """

    def __init__(self, app: App, keys: KeyRing, keyless: Iterable[str] = KEYLESS) -> None:
        """`keyless` are paths that anyone may read."""
        self._app = app
        self._keys = keys
        self._keyless = Paths(keyless)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._may_pass(scope):
            await self._app(scope, receive, send)
        else:
            count_refusal("key")
            headers = [(b"www-authenticate", b"Bearer")]
            await refuse(scope, send, HTTPStatus.UNAUTHORIZED, "missing or wrong API key", headers=headers)

    def _may_pass(self, scope: Scope) -> bool:
        self._refresh()
        method = scope.get("method")
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) == 1 and given[0][: len(SCHEME)].lower() == SCHEME:
            if (owner := self._keys.owner(given[0][len(SCHEME) :])) is not None:
                notes(scope).update(key=owner, admin=self._keys.may_administrate(owner))
                return True
        return method == "OPTIONS" or (method in ("GET", "HEAD") and inner_path(scope) in self._keyless)

    def _refresh(self) -> None:
        if self._keys.refresh():
            if self._keys.problem:
                logger.error("The API keys stay as they were: %s", self._keys.problem)
            else:
                logger.info("The API keys were read again: there are %d", len(self._keys))
