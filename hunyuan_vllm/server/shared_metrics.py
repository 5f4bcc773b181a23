"""/metrics of several API servers: it is what all of them write into common files, and what is collected is added here.

prometheus_client's collectors and infos, unlike its counters and gauges, do not write there.
"""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, generate_latest

from hunyuan_vllm.server.asgi import Message, Scope, Send

__all__ = ["adding", "are_shared", "plainly"]

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"  # vLLM sets it
NEGOTIATED = (b"accept", b"accept-encoding")


def are_shared() -> bool:
    """Whether there are several API servers."""
    return DIRECTORY in os.environ


def plainly(scope: Scope) -> Scope:
    """The request without a wish for OpenMetrics, which has an end that nothing may follow, or for compression."""
    return {**scope, "headers": [pair for pair in scope["headers"] if pair[0].lower() not in NEGOTIATED]}


def adding(send: Send, registry: CollectorRegistry) -> Send:
    """`send` for an answer in Prometheus's text format, in one piece, to which the figures of `registry` are added."""
    start: Message = {}

    async def add(message: Message) -> None:
        nonlocal start
        if message["type"] == "http.response.start":
            start = message
            return
        body = message.get("body", b"") + generate_latest(registry)
        headers = [pair for pair in start["headers"] if pair[0].lower() != b"content-length"]
        await send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await send({**message, "body": body})

    return add
