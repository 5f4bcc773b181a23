"""API keys: where the key comes from, and the middleware that asks for it on every path.

vLLM's own --api-key leaves paths such as /invocations, /tokenize and /pause open, and is there for `ps` to read.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from hunyuan_vllm.errors import UserError
from hunyuan_vllm.server.settings import KEY_FILE_VARIABLE

__all__ = ["RequireApiKey", "create_key_file", "read_key", "read_key_file"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = {"/health"}  # says only whether the server is alive; load balancers carry no key


def read_key_file(file: Path) -> str:
    """The key in `file`.

    Raises:
        UserError: it is absent, empty, or readable by others.
    """
    try:
        status = file.stat()
        key = file.read_text().strip()
    except OSError as error:
        raise UserError(f"the API key file {file} cannot be read: {error.strerror}") from None
    # As ssh has it: one's own file must be private; a secret that the system mounts belongs to another user.
    if status.st_uid == os.geteuid() and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"the API key file {file} is open to other users: chmod 600 {file}")
    if not key or not key.isascii() or any(character.isspace() for character in key):
        raise UserError(f"the API key file {file} must hold one line of visible ASCII characters")
    return key


def create_key_file(file: Path) -> None:
    """Write a new random key, readable by its owner alone; a file that is there is left as it is."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as output:
        output.write(secrets.token_urlsafe(32) + "\n")
    try:
        os.link(beside, file)
    except FileExistsError:
        pass
    finally:
        beside.unlink()


def read_key(environ: Mapping[str, str]) -> str:
    """The key a server was started with: HUNYUAN_VLLM_API_KEY_FILE, else VLLM_API_KEY.

    Raises:
        UserError: there is none.
    """
    if file := environ.get(KEY_FILE_VARIABLE):
        return read_key_file(Path(file))
    if key := environ.get("VLLM_API_KEY"):
        return key
    raise UserError(f"an API key is required and there is none: set {KEY_FILE_VARIABLE} or VLLM_API_KEY")


class RequireApiKey:
    """ASGI middleware (vLLM's --middleware): answers 401 to a request without `Authorization: Bearer KEY`.

    Open are /health and CORS preflights (OPTIONS), which browsers send without credentials.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._expected = f"Bearer {read_key(os.environ)}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._may_pass(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _refuse(send)

    def _may_pass(self, scope: Scope) -> bool:
        if scope.get("method") == "OPTIONS" or scope["path"] in OPEN_PATHS:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and secrets.compare_digest(given[0], self._expected)


async def _refuse(send: Send) -> None:
    body = b'{"error":{"message":"missing or wrong API key","type":"Unauthorized","param":null,"code":401}}'
    headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
