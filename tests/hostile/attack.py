"""Send hostile requests to a server, some at a time, and note what comes back."""

import asyncio
import re
import socket
import ssl
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from hostile.requests import Hostile

STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")
STREAMED_FAULT = re.compile(rb'"code": ?5\d\d')
LINGER_NOT = struct.pack("ii", 1, 0)
GRACE = 1.0  # seconds that one waits for an answer to what is no request


@dataclass(frozen=True)
class Answer:
    """`status` is that of the answer; None where none came. `fault` says what is wrong with it; None if nothing is."""

    request: Hostile
    status: int | None
    fault: str | None
    body: bytes


async def attack(
    url: str, requests: Iterable[Hostile], at_a_time: int, timeout: float, trust: ssl.SSLContext | None = None
) -> list[Answer]:
    """Send them all. An answer of 5xx, one that is none, and none within `timeout` seconds are faults."""
    waiting = iter(requests)
    answers: list[Answer] = []

    async def in_turn() -> None:
        for request in waiting:
            answers.append(await _exchange(url, request, timeout, trust))

    await asyncio.gather(*(in_turn() for _ in range(at_a_time)))
    return answers


async def _exchange(url: str, request: Hostile, timeout: float, trust: ssl.SSLContext | None) -> Answer:
    parts = urlsplit(url)
    answer = bytearray()
    closed = False
    try:
        async with asyncio.timeout(10):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=trust)
    except (OSError, TimeoutError) as error:
        return Answer(request, None, f"no connection: {error!r}", b"")
    try:
        async with asyncio.timeout(timeout if request.answered else min(timeout, GRACE)):
            with suppress(ConnectionError, ssl.SSLError):  # it may refuse before it has heard all
                await _send(writer, request)
            while len(answer) < request.read:
                part = await reader.read(min(65536, request.read - len(answer)))
                if not part:
                    break
                answer += part
            closed = True
    except TimeoutError:
        pass
    except (ConnectionError, ssl.SSLError):
        closed = True
    finally:
        _leave(writer, request.reset)
    return _judged(request, bytes(answer), closed)


async def _send(writer: asyncio.StreamWriter, request: Hostile) -> None:
    step = max(1, -(-len(request.data) // request.pieces))
    for start in range(0, len(request.data), step):
        writer.write(request.data[start : start + step])
        await writer.drain()
        if request.pause:
            await asyncio.sleep(request.pause)


def _leave(writer: asyncio.StreamWriter, reset: bool) -> None:
    if reset and (raw := writer.get_extra_info("socket")) is not None:
        with suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
        writer.transport.abort()
    else:
        writer.close()


def _judged(request: Hostile, answer: bytes, closed: bool) -> Answer:
    found = STATUS.match(answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n"))
    status = int(found[1]) if found else None
    fault = None
    if status is not None and status >= 500:
        fault = f"status {status}"
    elif STREAMED_FAULT.search(answer):
        fault = "an error of 5xx in a stream"
    elif request.answered and status is None:
        fault = "no answer" if closed else "no answer in time"
    elif request.answered and not closed:
        fault = "an answer that does not end"
    return Answer(request, status, fault, answer if fault else b"")
