"""Request ids in and out, and the line in the log: sizes, times and who, but nothing that was said."""

import json
import logging
import re

import httpx
import pytest
from prometheus_client import REGISTRY

from hunyuan_vllm.server.middleware.access_log import AccessLog
from hunyuan_vllm.server.middleware.asgi import request_info

SECRET = "what-the-client-said"


@pytest.fixture
def records():
    class Keep(logging.Handler):
        def emit(self, record):
            kept.append(record)

    kept: list[logging.LogRecord] = []
    handler, logger = Keep(), logging.getLogger("vllm.hunyuan_vllm.server.middleware.access_log")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield kept
    logger.removeHandler(handler)


async def echo(scope, receive, send):
    """Answers with the id that it was given."""
    await receive()
    request_info(scope)["key"] = "alice"
    status = int(scope["path"].rpartition("/")[2]) if scope["path"].startswith("/status/") else 200
    headers = [(b"X-Request-Id", b"another")] if scope["path"] == "/own" else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": dict(scope["headers"])[b"x-request-id"]})


async def ask(path="/v1/x", app=echo, **keywords) -> httpx.Response:
    middleware = AccessLog(app, quiet=["/health", "/status/503"])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(middleware), base_url="http://server") as client:
        return await client.post(path, content=SECRET, **keywords)


async def test_a_request_s_own_id_is_kept():
    answer = await ask(headers={"X-Request-Id": "order-66/a"})
    assert answer.headers["x-request-id"] == answer.text == "order-66/a"


@pytest.mark.parametrize(
    "headers",
    [{}, {"X-Request-Id": ""}, {"X-Request-Id": "x" * 129}, {"X-Request-Id": "a b"}, {"X-Request-Id": "a\tb"}]
    + [[("X-Request-Id", "one"), ("X-Request-Id", "two")]],
)
async def test_what_is_no_id_is_replaced(headers):
    answer = await ask(headers=headers)
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    assert answer.headers["x-request-id"] == answer.text


async def test_an_answer_has_one_id():
    answer = await ask("/own")
    assert answer.headers.get_list("x-request-id") == [answer.text]


async def test_the_line(records):
    await ask("/v1/x?q=" + SECRET, headers={"X-Request-Id": "i-1"})
    (record,) = records
    said = record.getMessage()
    for part in ("request_id=i-1", "key=alice", "method=POST", "path=/v1/x ", "status=200", "bytes_in=20"):
        assert part in said
    assert SECRET not in json.dumps(vars(record), default=str)
    assert record.seconds >= record.first_byte_seconds >= 0
    assert (record.request_id, record.status, record.bytes_out) == ("i-1", 200, 3)


def counted() -> dict[str, float]:
    name = "hunyuan_requests_answered_total"
    return {kind: REGISTRY.get_sample_value(name, {"status": kind}) for kind in ("2xx", "3xx", "4xx", "5xx")}


async def test_answers_are_counted_as_clients_see_them_but_not_those_to_probes():
    before = counted()
    for path in ("/v1/x", "/status/404", "/status/500", "/status/429", "/health", "/status/503"):
        await ask(path)
    grown = {kind: count - before[kind] for kind, count in counted().items()}
    assert grown == {"2xx": 1, "3xx": 0, "4xx": 2, "5xx": 1}


async def test_a_path_cannot_write_lines_of_its_own(records):
    await ask("/x%0Arequest request_id=fake")
    assert "\n" not in records[0].getMessage() and "fake" in records[0].path
    await ask("/" + "y" * 5000)
    assert len(records[1].path) == 200


async def test_probes_are_logged_when_they_fail(records):
    await ask("/health")
    assert records == []
    await ask("/status/503")
    assert records[0].status == 503


async def test_a_crash_and_a_client_that_left_are_logged(records):
    async def crashing(scope, receive, send):
        raise RuntimeError(SECRET)

    async def crashing_late(scope, receive, send):
        await send({"type": "http.response.start", "status": 400, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})
        raise RuntimeError(SECRET)

    async def silent(scope, receive, send):
        pass

    answer = await ask(app=crashing)
    assert answer.status_code == 500 and answer.json()["error"]["code"] == 500
    failure = records.pop(0)
    assert "RuntimeError in request" in failure.getMessage() and "in crashing" in failure.getMessage()
    assert (await ask(app=crashing_late)).status_code == 400
    assert not any(SECRET in record.getMessage().replace("raise RuntimeError(SECRET)", "") for record in records)
    sent = []
    await AccessLog(silent)({"type": "http", "method": "GET", "path": "/x", "headers": []}, None, sent.append)
    assert [record.status for record in records] == [500, 400, 499]
