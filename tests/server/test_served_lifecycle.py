"""The probes and the drain of a real server: its engine is halted for a while, then it is stopped amid a stream."""

import json
import signal
import threading
import time

import httpx
import pytest
from serving import halted, running_server
from waiting import eventually

pytestmark = [pytest.mark.server, pytest.mark.slow]
KEY = "the-key-of-this-test"
READY_TIMEOUT = 2.0
STREAM = {"prompt": "1", "max_tokens": 300, "ignore_eos": True, "temperature": 1, "stream": True, "n": 4}


@pytest.fixture(scope="module")
def server():
    with running_server(VLLM_API_KEY=KEY, HUNYUAN_VLLM_READY_TIMEOUT=str(READY_TIMEOUT)) as running:
        yield running


def get(server, path):
    return httpx.get(server.url + path, timeout=30, trust_env=False)


class Stream(threading.Thread):
    """A client that reads a stream to its end."""

    def __init__(self, url):
        super().__init__()
        self.url, self.tokens, self.ended, self.error = url, 0, False, None
        self.begun = threading.Event()

    def run(self):
        headers = {"Authorization": f"Bearer {KEY}"}
        try:
            with httpx.stream(
                "POST", f"{self.url}/v1/completions", json=STREAM, headers=headers, timeout=60, trust_env=False
            ) as answer:
                for line in answer.iter_lines():
                    self.begun.set()
                    if line == "data: [DONE]":
                        self.ended = True
                    elif line.startswith("data: "):
                        self.tokens += bool(json.loads(line[6:])["choices"][0]["text"])
        except httpx.HTTPError as error:
            self.error = error


def test_probes_answer_without_the_key(server):
    assert get(server, "/v1/models").status_code == 401
    assert get(server, "/livez").json() == {"status": "alive"}
    assert get(server, "/readyz").json() == {"status": "ready", "reason": ""}


def test_a_halted_engine_is_alive_by_vllms_word_and_not_ready(server):
    time.sleep(1.2)  # for so long the last answer stands
    with server.halted_engine():
        assert get(server, "/health").status_code == 200
        asked = time.monotonic()
        answer = get(server, "/readyz")
        assert time.monotonic() - asked < 10 * READY_TIMEOUT
        assert (answer.status_code, answer.json()["status"]) == (503, "stalled")
        assert get(server, "/livez").status_code == 200
    eventually(lambda: get(server, "/readyz").status_code == 200)


def test_a_stop_lets_a_stream_end(server):
    # The last test of this file: the server is gone after it.
    stream, engine = Stream(server.url), server.engine
    stream.start()
    assert stream.begun.wait(30)
    with halted(engine):
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: get(server, "/readyz").json()["status"] == "draining")
        assert stream.is_alive(), "the stream is too short for this test"
        refused = httpx.post(f"{server.url}/v1/completions", json=STREAM, timeout=10, trust_env=False)
        assert (refused.status_code, refused.headers["connection"]) == (503, "close")
        assert int(refused.headers["retry-after"]) > 0
        assert (get(server, "/readyz").status_code, get(server, "/readyz").json()["status"]) == (503, "draining")
    stream.join(100)
    assert (stream.error, stream.ended) == (None, True)
    assert server.process.wait(30) == 0
    said = server.said
    assert "Draining: all requests have finished" in said
    assert "Traceback" not in said and "leaked" not in said
