"""ASGI's types, what the middleware keeps of a request, and error answers in the form of the route"""

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http import HTTPStatus
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]

REQUEST_INFO = "hunyuan_vllm.request"
BODY = "body"
NO_KEY = "-"  # for requests without a key, in counters by key
POLICY_VIOLATION, SERVICE_RESTART = 1008, 1012  # why a websocket is closed
ANTHROPIC = ("/v1/messages", "/v1/messages/count_tokens")
ANTHROPIC_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
}


def request_info(scope: Scope) -> dict[str, Any]:
    """What is known of a request: `request_id`, `key` (the name of its key), `admin`, `body`, and token counts."""
    found: dict[str, Any] = scope.setdefault(REQUEST_INFO, {})
    return found


def without_prefix(scope: Scope) -> Scope:
    """The request with the path of the application's routes: without --root-path, unless a proxy has removed it."""
    root = str(scope.get("root_path") or "").rstrip("/")
    if not root or scope["type"] == "lifespan":
        return scope
    path = str(scope["path"])
    if path.startswith(f"{root}/"):
        path = path.removeprefix(root)
    # Starlette would remove the prefix again from a path that still begins with it.
    return {**scope, "path": path, "root_path": "" if f"{path}/".startswith(f"{root}/") else root}


def error_body(path: str, status: int, message: str, param: str | None = None) -> bytes:
    """An error in the form that clients of a route expect: Anthropic's, or OpenAI's, which is also vLLM's own."""
    content: dict[str, object]
    if path in ANTHROPIC:
        other = "api_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        kind = ANTHROPIC_TYPES.get(HTTPStatus(status), other)
        content = {"type": "error", "error": {"type": kind, "message": message}}
    else:
        phrase = HTTPStatus(status).phrase
        content = {"error": {"message": message, "type": phrase, "param": param, "code": int(status)}}
    return json.dumps(content, ensure_ascii=False).encode()


async def respond(send: Send, status: int, body: bytes, headers: Iterable[Header] = ()) -> None:
    """Send an answer in JSON."""
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": int(status), "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})


async def refuse(
    scope: Scope,
    send: Send,
    status: HTTPStatus,
    message: str,
    param: str | None = None,
    headers: Iterable[Header] = (),
) -> None:
    """Answer with an error, in the form of the route; close a websocket."""
    if scope["type"] == "websocket":
        unavailable = status == HTTPStatus.SERVICE_UNAVAILABLE
        await send({"type": "websocket.close", "code": SERVICE_RESTART if unavailable else POLICY_VIOLATION})
    else:
        await respond(send, status, error_body(scope["path"], status, message, param), headers)
