"""A real server under malformed and hostile requests (benchmarks/hostile.py sends twenty times as many)."""

import json
from collections import Counter

import httpx
import pytest
from hostile import attack, footprint, hostile_requests, wait_until_idle
from keyed_server import KEYS, KeyedServer

pytestmark = pytest.mark.server
SALT = {"messages": [{"role": "user", "content": "Why is sea water salty?"}], "temperature": 0, "max_tokens": 60}
KINDS = {"fields", "not JSON", "headers", "paths and methods", "framing", "cut short", "gone in the middle", "slow"}
MOST = 200 * 2**20  # bytes that compiled grammars and schemas may take at first


def counted(client: httpx.Client, sample: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(sample)).split()[1])


async def test_no_request_breaks_it_or_leaves_anything_behind(keyed_server: KeyedServer) -> None:
    requests = list(hostile_requests(7, 500, KEYS["alice"]))
    assert {request.kind for request in requests} == KINDS
    pid = keyed_server.server.process.pid
    with keyed_server.http() as client:
        right = client.post("/v1/chat/completions", json=SALT).json()["choices"]
        before = footprint(pid)
        answers = await attack(keyed_server.url, requests, at_a_time=4, timeout=60, trust=keyed_server.trust)
        assert [(one.request.about, one.fault, one.body) for one in answers if one.fault] == []
        statuses = Counter(one.status for one in answers)
        assert statuses[400] > 150 and statuses[200] > 50 and statuses[401] and statuses[404] and statuses[422]
        wait_until_idle(client)
        assert client.post("/v1/chat/completions", json=SALT).json()["choices"] == right
        # What vLLM counts as its own failure was a client's mistake.
        assert counted(client, 'hunyuan_requests_answered_total{status="5xx"}') == 0
        assert counted(client, 'hunyuan_requests_answered_total{status="4xx"}') > 150
    after = footprint(pid)
    assert after.processes == before.processes
    assert after.files <= before.files + 5 and after.threads <= before.threads + 5
    assert after.memory <= before.memory + MOST


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (  # without call_id
            {"type": "function_call_output", "output": [{"type": "input_text", "text": "a"}]},
            "message 1",
        ),
        ({"type": "message", "role": "assistant", "content": []}, "input has content"),
        (
            {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            "input has content",
        ),
    ],
)
def test_an_input_that_vllm_cannot_place_is_a_bad_request(
    keyed_server: KeyedServer, item: dict[str, object], said: str
) -> None:
    with keyed_server.http() as client:
        answer = client.post("/v1/responses", json={"input": [{**item, "id": "x", "status": "completed"}]})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"stop": ["\ud800"]}, "stop.0"),
        ({"stream_interval": 10**30}, "stream_interval"),
        ({"temperature": float("nan")}, "temperature"),
        ({"structured_outputs": 5}, "structured_outputs"),
        ({"structured_outputs": {"json": {"$ref": "#"}}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: start"}}, "structured_outputs"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_vllm_fails_on_is_a_bad_request(
    keyed_server: KeyedServer, change: dict[str, object], field: str, stream: bool
) -> None:
    body = json.dumps({**SALT, **change, "stream": stream}).encode()
    with keyed_server.http(**{"Content-Type": "application/json"}) as client:
        answer = client.post("/v1/chat/completions", content=body)
    if stream and answer.status_code == 200:  # the engine fails on it after the stream has begun
        error = json.loads(answer.text.split("\n\n")[1].removeprefix("data: "))["error"]
    else:
        assert answer.status_code == 400
        error = answer.json()["error"]
    assert (error["code"], error["param"]) == (400, field)
