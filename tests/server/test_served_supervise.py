"""A supervised server whose processes are killed while clients stream: they hear of it, and it is there again."""

import json
import re
import signal
import threading
import time

import httpx
import psutil
import pytest
from serving import running_server
from waiting import eventually

pytestmark = [pytest.mark.server, pytest.mark.slow]
CLIENTS = 8
HEARD_WITHIN = 15.0  # seconds
READY_WITHIN = 240.0  # half a minute on an idle machine
# Long enough that a kill falls into it where the machine is busy and the first token is heard late.
STREAM = {"prompt": "1", "max_tokens": 2000, "ignore_eos": True, "temperature": 1, "stream": True, "n": 8}


@pytest.fixture(scope="module")
def server():
    with running_server("--supervise", "--max-restarts", "1", "--enforce-eager", as_users_do=True) as running:
        yield running


class Client(threading.Thread):
    """Streams until it has all tokens (`ended`) or an error (`error`)."""

    def __init__(self, url):
        super().__init__(daemon=True)
        self.url, self.ended, self.error = url, None, None
        self.begun = threading.Event()

    def run(self):
        try:
            with httpx.stream("POST", f"{self.url}/v1/completions", json=STREAM, timeout=60, trust_env=False) as answer:
                for line in answer.iter_lines():
                    self.begun.set()
                    if line.startswith('data: {"error"') or answer.status_code != 200:
                        self.error = line
                    elif line.startswith("data: {") and (reason := json.loads(line[6:])["choices"][0]["finish_reason"]):
                        if reason == "length":
                            self.ended = line
                        else:
                            self.error = line
        except httpx.HTTPError as error:
            self.error = error


def family(server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def kill_amid_streams(server, victim):
    """Kill -9 it, and return once all clients have heard and the service is ready again."""
    before = family(server)
    announced = server.said.count("ready after")
    clients = [Client(server.url) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    assert all(client.begun.wait(30) for client in clients)
    victim.kill()
    killed = time.monotonic()
    for client in clients:
        client.join(max(killed + HEARD_WITHIN - time.monotonic(), 0))
    assert not any(client.is_alive() for client in clients)
    assert all(client.error or client.ended for client in clients)
    assert any(client.error for client in clients), "the streams are too short for this test"
    eventually(lambda: server.said.count("ready after") > announced, READY_WITHIN)
    assert httpx.get(f"{server.url}/readyz", timeout=30, trust_env=False).json()["status"] == "ready"
    assert not any(process.is_running() for process in before)


def restarts(server) -> float:
    metrics = httpx.get(f"{server.url}/metrics", timeout=30, trust_env=False).text
    return float(re.search(r"^hunyuan_supervisor_restarts_total (\S+)$", metrics, re.MULTILINE)[1])


def test_the_engine_is_killed(server):
    assert restarts(server) == 0
    (engine,) = [process for process in family(server) if "EngineCore" in " ".join(process.cmdline())]
    kill_amid_streams(server, engine)
    assert restarts(server) == 1
    assert re.search(r"s of service: process EngineCore\S* was killed by SIGKILL", server.said)


def test_the_front_end_is_killed_once_too_often(server):
    """After --max-restarts failures in a row it exits, and its engine with it."""
    # The last test of this file: the server is gone after it.
    (front_end,) = psutil.Process(server.process.pid).children()
    left = family(server)
    client = Client(server.url)
    client.start()
    assert client.begun.wait(30)
    front_end.send_signal(signal.SIGKILL)
    client.join(HEARD_WITHIN)
    assert client.error is not None
    assert server.process.wait(60) == 69
    assert "the API server was killed by SIGKILL" in server.said
    assert "giving up after 2 failures in a row" in server.said
    eventually(lambda: not any(process.is_running() for process in left))
