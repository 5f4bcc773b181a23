"""The chat page"""

import hashlib
import re
from functools import partial
from pathlib import Path, PurePosixPath

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.staticfiles import NotModifiedResponse, StaticFiles

from hunyuan_vllm.server.middleware.asgi import App, Message, Receive, Scope, Send

IMPORT = re.compile(r'^import (?:(\w+)|(\{[^}]+\})) from "(\./[\w./-]+)";$', re.M)
NAMED_EXPORT = re.compile(r"^export (?=(?:async )?(?:function\*?|class|const) (\w+))", re.M)
DEFAULT_EXPORT = re.compile(r"^export\s*\{\s*(\w+) as default\s*\};?(?:\s*//# sourceMappingURL=\S+)?\s*\Z", re.M)


def bundle(directory: Path, entry: str) -> str:
    """`entry` and the modules it imports as one script, each in its own scope, in the order of imports.

    Supports what our modules and their libraries use: imports from relative paths, one per line; exports of
    declarations; and a default export at the end.
    """
    scopes: dict[str, str] = {}

    def add(name: str) -> None:
        text = (directory / name).read_text()
        here = PurePosixPath(name).parent
        for _, _, path in IMPORT.findall(text):
            if str(here / path) not in scopes:
                add(str(here / path))
        exports = NAMED_EXPORT.findall(text)
        if default := DEFAULT_EXPORT.search(text):
            exports.append(f"default: {default[1]}")
        text = IMPORT.sub(partial(_constant, here), NAMED_EXPORT.sub("", DEFAULT_EXPORT.sub("", text)))
        scopes[name] = f'modules["{name}"] = (() => {{\n{text}\nreturn {{ {", ".join(exports)} }};\n}})();\n'

    add(entry)
    return "const modules = {};\n" + "".join(scopes.values())


def _constant(directory: PurePosixPath, statement: re.Match[str]) -> str:
    default, names, path = statement.groups()
    return f'const {f"{{ default: {default} }}" if default else names} = modules["{directory / path}"];'


PAGE = Path(__file__).parents[1] / "page"
SCRIPT = "/chat/app.js"
# Whatever a model writes: no inline script or style runs, nothing is fetched from or sent to another origin, and only
# the sanitiser turns strings into HTML (trusted types).
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
    "cache-control": "no-cache",  # revalidated each time, with 304 if unchanged
}


class ChatPage:
    """Answers GET for the page, its script and the other files below `/chat/`."""

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
