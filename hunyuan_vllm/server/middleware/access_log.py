"""ASGI middleware for what an operator follows requests by: an id in and out, a line in the log for each, and a count.

Never a word of a prompt or an answer: the line has sizes and times.
"""

from __future__ import annotations

import re
import time
import traceback
import uuid
from collections.abc import Iterable
from http import HTTPStatus
from urllib.parse import quote

from vllm.logger import init_logger

from hunyuan_vllm.server.middleware.asgi import App, Message, Receive, Scope, Send, notes, refuse
from hunyuan_vllm.server.middleware.counters import GENERATED, PROMPT, REQUEST, count_answer

logger = init_logger(f"vllm.{__name__}")  # vLLM configures only loggers below its own name
HEADER = b"x-request-id"
TAKEN = re.compile(rb"[\w.:+/=@-]{1,128}", re.ASCII)  # of a client's id; whatever else it sends is replaced
LONGEST_PATH = 200
CLIENT_CLOSED_REQUEST = 499  # nginx's: the client went away before an answer began


class RequestLog:
    """Gives a request its id, which vLLM and the answer then carry, and logs and counts it when it has ended."""

    def __init__(self, app: App, quiet: Iterable[str] = ()) -> None:
        """`quiet` are paths of probes, which come all the time: logged only where they fail, and not counted."""
        self._app = app
        self._quiet = frozenset(quiet)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send)
        is_quiet = scope["path"] in self._quiet
        REQUEST.set(None if is_quiet else notes(scope))
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except Exception as error:
            # Not handed on: the HTTP server would log its text, which quotes the request. vLLM raises some errors again
            # after it has answered them.
            if exchange.status == CLIENT_CLOSED_REQUEST:
                message = "the server failed on this request"
                await refuse(scope, exchange.send, HTTPStatus.INTERNAL_SERVER_ERROR, message)
            if exchange.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                frames = "".join(traceback.format_tb(error.__traceback__))
                logger.error("%s in request %s:\n%s", type(error).__name__, notes(scope)["request_id"], frames)
        finally:
            if not is_quiet:
                count_answer(exchange.status)
            if not is_quiet or exchange.status >= HTTPStatus.BAD_REQUEST:
                exchange.log()


class _Exchange:
    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.status = CLIENT_CLOSED_REQUEST
        self._scope, self._receive, self._send = scope, receive, send
        self._begun = time.perf_counter()
        self._first: float | None = None  # when the answer's first byte went out
        self._received = self._sent = 0  # bytes
        given = [value for name, value in scope["headers"] if name == HEADER]
        usable = len(given) == 1 and TAKEN.fullmatch(given[0])
        self._id = given[0] if usable else uuid.uuid4().hex.encode()
        scope["headers"] = [*(pair for pair in scope["headers"] if pair[0] != HEADER), (HEADER, self._id)]
        notes(scope)["request_id"] = self._id.decode()

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
            self._first = self._first or time.perf_counter()
            self._sent += len(body)
        await self._send(message)

    def log(self) -> None:
        now = time.perf_counter()
        fields: dict[str, object] = {
            "request_id": self._id.decode(),
            "key": notes(self._scope).get("key"),
            "method": self._scope["method"],
            "path": quote(self._scope["path"])[:LONGEST_PATH],
            "status": int(self.status),
            "seconds": round(now - self._begun, 4),
            "first_byte_seconds": round(self._first - self._begun, 4) if self._first else None,
            "bytes_in": self._received,
            "bytes_out": self._sent,
            PROMPT: notes(self._scope).get(PROMPT),
            GENERATED: notes(self._scope).get(GENERATED),
        }
        text = " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
        # The same as fields of their own where logs are JSON.
        logger.info("request %s", text, extra=fields)
