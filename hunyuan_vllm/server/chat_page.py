"""The chat page at `/`, as ASGI middleware: its files, open without a key, that run nothing but themselves."""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.staticfiles import NotModifiedResponse, StaticFiles

from hunyuan_vllm.server.asgi import App, Message, Receive, Scope, Send
from hunyuan_vllm.server.chat_bundle import bundle

__all__ = ["PAGE", "SECURITY_HEADERS", "ChatPage"]

PAGE = Path(__file__).with_name("page")
SCRIPT = "/chat/app.js"
# The page shows what a model wrote. Whatever that is: no inline script or style runs, nothing is fetched from or sent
# to another origin, and no string becomes HTML but through the sanitiser (trusted types).
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types dompurify"
)
SECURITY_HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",  # asked again each time, and answered with 304 while it is the same
}


class ChatPage:
    """Answers GET for the page, its script and the other files below `/chat/`; all else goes to the application."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._files = StaticFiles(directory=PAGE, html=True)
        files = (f"/{file.relative_to(PAGE).as_posix()}" for file in (PAGE / "chat").rglob("*") if file.is_file())
        self._paths = {"/", SCRIPT, *(path for path in files if not path.endswith(".js"))}
        self._script = bundle(PAGE / "chat", "app.js").encode()
        self._etag = f'"{hashlib.sha256(self._script).hexdigest()[:32]}"'

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["type"] == "http" and scope["method"] in ("GET", "HEAD") else None
        if path not in self._paths:
            await self._app(scope, receive, send)
            return
        answer: App = self._files
        if path == SCRIPT:
            answer = Response(self._script, media_type="text/javascript", headers={"etag": self._etag})
            if self._files.is_not_modified(answer.headers, Headers(scope=scope)):
                answer = NotModifiedResponse(answer.headers)
        await answer(scope, receive, _with_security_headers(send))


def _with_security_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(SECURITY_HEADERS)
        await send(message)

    return send_with_headers
