"""The chat page at `/`, as ASGI middleware: static files, open without a key, that run nothing but themselves."""

from __future__ import annotations

from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.staticfiles import StaticFiles

from hunyuan_vllm.server.asgi import App, Message, Receive, Scope, Send, inner_path

__all__ = ["PAGE", "SECURITY_HEADERS", "ChatPage"]

PAGE = Path(__file__).with_name("page")
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
    """Answers GET for the page and the files below `/chat/` that it consists of; all else goes to the application."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._files = StaticFiles(directory=PAGE, html=True)
        files = (file.relative_to(PAGE) for file in (PAGE / "chat").rglob("*") if file.is_file())
        self._paths = {"/", *(f"/{file.as_posix()}" for file in files)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and inner_path(scope) in self._paths:
            await self._files(scope, receive, _with_security_headers(send))
        else:
            await self._app(scope, receive, send)


def _with_security_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(SECURITY_HEADERS)
        await send(message)

    return send_with_headers
