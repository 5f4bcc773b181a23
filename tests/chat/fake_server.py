"""The chat page in front of a server that answers what a test tells it to, where no model would: hostility, faults."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from serving import free_port
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from hunyuan_vllm.server.middleware.page import ChatPage

MODEL = {"id": "fake", "root": "fake", "parent": None, "max_model_len": 1000}


@dataclass
class FakeServer:
    """What it answers: `text`, 7 characters a piece, or `fault` instead; and what it was asked last."""

    url: str
    models: tuple[dict[str, Any], ...] = (MODEL,)
    text: str = ""
    reasoning: str = ""
    fault: tuple[int, str, dict[str, str]] | None = None
    breaks_off: bool = False
    pace: float = 0.001  # seconds between pieces
    tokens: int = 1  # of a piece
    asked: dict[str, Any] = field(default_factory=dict)

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"data": self.models})

    async def chat(self, request: Request) -> Response:
        self.asked = await request.json()
        if self.fault:
            status, message, headers = self.fault
            return JSONResponse({"error": {"message": message, "code": status}}, status, headers)
        return StreamingResponse(self._chunks(), media_type="text/event-stream")

    async def _chunks(self) -> AsyncIterator[str]:
        if self.reasoning:
            choice = {"index": 0, "delta": {"reasoning": self.reasoning}, "finish_reason": None}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
        pieces = [self.text[start : start + 7] for start in range(0, len(self.text), 7)]
        for count, piece in enumerate(pieces, 1):
            usage = {"prompt_tokens": 9, "completion_tokens": count * self.tokens}
            finish = "stop" if count == len(pieces) and not self.breaks_off else None
            choice = {"index": 0, "delta": {"content": piece}, "finish_reason": finish}
            yield f"data: {json.dumps({'choices': [choice], 'usage': usage})}\n\n"
            await asyncio.sleep(self.pace)
        if not self.breaks_off:
            yield "data: [DONE]\n\n"


@contextmanager
def fake_server(**certificate: str) -> Iterator[FakeServer]:
    """Start it; with HTTPS where uvicorn's ssl_certfile and ssl_keyfile are given."""
    port = free_port()
    fake = FakeServer(f"http{'s' if certificate else ''}://127.0.0.1:{port}")
    routes = [Route("/v1/models", fake.list_models), Route("/v1/chat/completions", fake.chat, methods=["POST"])]
    config = uvicorn.Config(ChatPage(Starlette(routes=routes)), port=port, log_level="warning", **certificate)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        yield fake
    finally:
        server.should_exit = True
        thread.join(timeout=10)
