"""Request ids, and one log line for each request: sizes and times, never a word of a prompt or an answer"""

import re
import time
import traceback
import uuid
from collections.abc import Iterable
from http import HTTPStatus
from urllib.parse import quote

from vllm.logger import init_logger

from hunyuan_vllm.server.middleware.asgi import App, Message, Receive, Scope, Send, refuse, request_info
from hunyuan_vllm.server.middleware.generation import GENERATED, PROMPT, REQUEST
from hunyuan_vllm.server.middleware.metrics import count_answer

logger = init_logger(f"vllm.{__name__}")  # vLLM configures only loggers below its own name
HEADER = b"x-request-id"
VALID_ID = re.compile(rb"[\w.:+/=@-]{1,128}", re.ASCII)  # other ids of clients are replaced
MAX_PATH = 200
CLIENT_CLOSED_REQUEST = 499  # nginx's: the client went away before an answer began


class AccessLog:
    """Gives each request an id, which vLLM and the answer then carry; logs and counts it when it has ended."""

    def __init__(self, app: App, quiet: Iterable[str] = ()) -> None:
        """`quiet` are paths of probes: logged only when they fail, and not counted."""
        self._app = app
        self._quiet = frozenset(quiet)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Request(scope, receive, send)
        is_quiet = scope["path"] in self._quiet
        REQUEST.set(None if is_quiet else request.info)
        try:
            await self._app(scope, request.receive, request.send)
        except Exception as error:
            # Not raised further: the HTTP server would log its text, which quotes the request. vLLM raises some errors
            # again after it has answered them.
            if request.status == CLIENT_CLOSED_REQUEST:
                message = "the server failed on this request"
                await refuse(scope, request.send, HTTPStatus.INTERNAL_SERVER_ERROR, message)
            if request.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                frames = "".join(traceback.format_tb(error.__traceback__))
                logger.error("%s in request %s:\n%s", type(error).__name__, request.info["request_id"], frames)
        finally:
            if not is_quiet:
                count_answer(request.status)
            if not is_quiet or request.status >= HTTPStatus.BAD_REQUEST:
                request.log()


class _Request:
    """One request: passes its messages on, and notes status, times and sizes."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.status = CLIENT_CLOSED_REQUEST
        self._scope, self._receive, self._send = scope, receive, send
        self._started = time.perf_counter()
        self._first_byte: float | None = None
        self._received = self._sent = 0  # bytes
        given = [value for name, value in scope["headers"] if name == HEADER]
        usable = len(given) == 1 and VALID_ID.fullmatch(given[0])
        self._id = given[0] if usable else uuid.uuid4().hex.encode()
        scope["headers"] = [*(pair for pair in scope["headers"] if pair[0] != HEADER), (HEADER, self._id)]
        self.info = request_info(scope)
        self.info["request_id"] = self._id.decode()

    async def receive(self) -> Message:
        message = await self._receive()
        self._received += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [pair for pair in message.get("headers", ()) if pair[0].lower() != HEADER]
            message = {**message, "headers": [*headers, (HEADER, self._id)]}
        elif body := message.get("body", b""):
            self._first_byte = self._first_byte or time.perf_counter()
            self._sent += len(body)
        await self._send(message)

    def log(self) -> None:
        fields: dict[str, object] = {
            "request_id": self.info["request_id"],
            "key": self.info.get("key"),
            "method": self._scope["method"],
            "path": quote(self._scope["path"])[:MAX_PATH],
            "status": int(self.status),
            "seconds": round(time.perf_counter() - self._started, 4),
            "first_byte_seconds": round(self._first_byte - self._started, 4) if self._first_byte else None,
            "bytes_in": self._received,
            "bytes_out": self._sent,
            PROMPT: self.info.get(PROMPT),
            GENERATED: self.info.get(GENERATED),
        }
        text = " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
        logger.info("request %s", text, extra=fields)  # as fields in JSON logs
