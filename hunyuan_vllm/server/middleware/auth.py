"""API keys on every path; vLLM's own --api-key is visible to `ps` and leaves paths such as /tokenize and /pause open"""

from collections.abc import Iterable
from http import HTTPStatus

from vllm.logger import init_logger

from hunyuan_vllm.server.keys import KeyRing
from hunyuan_vllm.server.middleware.asgi import App, Receive, Scope, Send, refuse, request_info
from hunyuan_vllm.server.middleware.metrics import count_refusal
from hunyuan_vllm.server.middleware.routes import KEYLESS

logger = init_logger(f"vllm.{__name__}")  # vLLM configures only loggers below its own name
SCHEME = b"bearer "
CREDENTIALS = (b"authorization", b"x-api-key")
PREFLIGHT = {b"origin", b"access-control-request-method"}


class RequireApiKey:
    """Answers 401 to a request without `Authorization: Bearer KEY` or `x-api-key: KEY`, the same for every reason.

    No key is needed to read the keyless paths, nor for CORS preflights, which browsers send without credentials and
    vLLM answers itself whatever the path.
    """

    def __init__(self, app: App, keys: KeyRing, keyless: Iterable[str] = KEYLESS) -> None:
        self._app = app
        self._keys = keys
        self._keyless = frozenset(keyless)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._admits(scope):
            await self._app(scope, receive, send)
        else:
            count_refusal("key")
            headers = [(b"www-authenticate", b"Bearer")]
            await refuse(scope, send, HTTPStatus.UNAUTHORIZED, "missing or wrong API key", headers=headers)

    def _admits(self, scope: Scope) -> bool:
        self._refresh_keys()
        given = _given_key(scope)
        if given is not None and (name := self._keys.owner(given)) is not None:
            request_info(scope).update(key=name, admin=self._keys.may_administrate(name))
            # If VLLM_API_KEY is set, vLLM checks it itself, in this form only.
            others = [pair for pair in scope["headers"] if pair[0] not in CREDENTIALS]
            scope["headers"] = [*others, (b"authorization", b"Bearer " + given)]
            return True
        method = scope.get("method")
        if method == "OPTIONS":
            return PREFLIGHT <= {name for name, _ in scope["headers"]}
        return method in ("GET", "HEAD") and scope["path"] in self._keyless

    def _refresh_keys(self) -> None:
        if self._keys.refresh():
            if self._keys.problem:
                logger.error("The API keys are unchanged: %s", self._keys.problem)
            else:
                logger.info("The API keys were reloaded: there are %d", len(self._keys))


def _given_key(scope: Scope) -> bytes | None:
    """The key that a request carries: OpenAI's clients send a bearer, Anthropic's x-api-key. None if ambiguous."""
    bearers = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(bearers) == 1 and bearers[0][: len(SCHEME)].lower() == SCHEME:
        return bearers[0][len(SCHEME) :]
    plain = [value for name, value in scope["headers"] if name == b"x-api-key"]
    return plain[0] if len(plain) == 1 and not bearers else None
