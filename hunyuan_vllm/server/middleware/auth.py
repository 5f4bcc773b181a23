"""ASGI middleware that asks for an API key on every path.

vLLM's own --api-key leaves paths such as /invocations, /tokenize and /pause open, and is there for `ps` to read.
"""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus

from vllm.logger import init_logger

from hunyuan_vllm.server.keys import KeyRing
from hunyuan_vllm.server.middleware.asgi import App, Receive, Scope, Send, notes, refuse
from hunyuan_vllm.server.middleware.counters import count_refusal
from hunyuan_vllm.server.middleware.routes import KEYLESS, Paths

logger = init_logger(f"vllm.{__name__}")  # vLLM configures only loggers below its own name
SCHEME = b"bearer "
CREDENTIALS = (b"authorization", b"x-api-key")
PREFLIGHT = {b"origin", b"access-control-request-method"}


class RequireApiKey:
    """Answers 401 to a request without `Authorization: Bearer KEY` or `x-api-key: KEY`, the same for every reason.

    Open are CORS preflights, which browsers send without credentials and vLLM answers itself, whatever the path; and to
    be read the keyless paths.
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
        given = _given(scope)
        if given is not None and (owner := self._keys.owner(given)) is not None:
            notes(scope).update(key=owner, admin=self._keys.may_administrate(owner))
            # vLLM itself asks for VLLM_API_KEY, where that is set, in this form alone.
            others = [pair for pair in scope["headers"] if pair[0] not in CREDENTIALS]
            scope["headers"] = [*others, (b"authorization", b"Bearer " + given)]
            return True
        method = scope.get("method")
        return _is_preflight(scope) or (method in ("GET", "HEAD") and scope["path"] in self._keyless)

    def _refresh(self) -> None:
        if self._keys.refresh():
            if self._keys.problem:
                logger.error("The API keys stay as they were: %s", self._keys.problem)
            else:
                logger.info("The API keys were read again: there are %d", len(self._keys))


def _given(scope: Scope) -> bytes | None:
    """The key that a request carries: of OpenAI's clients as a bearer, of Anthropic's as x-api-key. None if unclear."""
    bearers = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(bearers) == 1 and bearers[0][: len(SCHEME)].lower() == SCHEME:
        return bearers[0][len(SCHEME) :]
    plain = [value for name, value in scope["headers"] if name == b"x-api-key"]
    return plain[0] if len(plain) == 1 and not bearers else None


def _is_preflight(scope: Scope) -> bool:
    names = {name for name, _ in scope["headers"]}
    return scope.get("method") == "OPTIONS" and names >= PREFLIGHT
