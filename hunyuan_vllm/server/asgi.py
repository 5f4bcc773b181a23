"""The types of ASGI, and an answer in OpenAI's error form, for the layers around vLLM's application."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http import HTTPStatus
from typing import Any

__all__ = ["App", "Message", "Receive", "Scope", "Send", "inner_path", "notes", "refuse"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]

NOTES = "hunyuan_vllm.notes"
POLICY_VIOLATION = 1008


def notes(scope: Scope) -> dict[str, Any]:
    """What the layers tell each other about one request: `request_id`, and `key`, the name of the key it carries."""
    found: dict[str, Any] = scope.setdefault(NOTES, {})
    return found


def inner_path(scope: Scope) -> str:
    """The path as the application's routes see it: without the prefix that vLLM's --root-path names."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path.removeprefix(root) if root and path.startswith(f"{root}/") else path


async def refuse(
    scope: Scope,
    send: Send,
    status: HTTPStatus,
    message: str,
    param: str | None = None,
    headers: Iterable[Header] = (),
) -> None:
    """Answer with an error, in the form that vLLM's own errors have; close a websocket."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": POLICY_VIOLATION})
        return
    error = {"message": message, "type": status.phrase, "param": param, "code": int(status)}
    body = json.dumps({"error": error}, ensure_ascii=False).encode()
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": int(status), "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})
