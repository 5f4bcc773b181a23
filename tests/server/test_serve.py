"""`hunyuan-vllm serve` on the demo model, as a user meets it: one server for all tests of this file."""

import json
import os
import subprocess
from pathlib import Path

import httpx
import psutil
import pytest
from serving import COMMAND, running_server
from waiting import eventually

pytestmark = [pytest.mark.server, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
KEY = "the-key-of-this-test"


@pytest.fixture(scope="module")
def server():
    with running_server("-O2", as_users_do=True, VLLM_API_KEY=KEY) as running:  # compiled, as other models are
        yield running


def family(server) -> list[psutil.Process]:
    launcher = psutil.Process(server.process.pid)
    return [launcher, *launcher.children(recursive=True)]


def test_it_says_how_to_ask(server):
    eventually(lambda: f"curl {server.url}/v1/chat/completions" in server.said)
    assert KEY not in server.said


def test_the_key_is_in_no_command_line(server):
    assert not any(KEY in word for process in family(server) for word in process.cmdline())


@pytest.mark.parametrize("path", ["/v1/models", "/tokenize", "/invocations", "/metrics", "/openapi.json", "/version"])
def test_without_the_key_every_path_is_closed(server, path):
    assert httpx.get(server.url + path, trust_env=False).status_code == 401
    assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200


def test_pages_of_other_sites_may_not_ask(server):
    headers = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    for method in ("OPTIONS", "GET"):
        answer = httpx.request(method, f"{server.url}/health", headers=headers, trust_env=False)
        assert "access-control-allow-origin" not in answer.headers


def test_nothing_listens_beyond_loopback(server):
    listening = [
        (process.pid, connection.laddr)
        for process in family(server)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    (front_end,) = psutil.Process(server.process.pid).children()
    # Not the engine, which is forked from it.
    assert [pid for pid, address in listening if address.port == server.port] == [front_end.pid]
    assert {address.ip for _, address in listening} <= {"127.0.0.1", "::1"}


def test_openapi_script_gets_an_answer_that_ends_by_itself(server):
    raw, text = (
        subprocess.run(
            ["sh", ROOT / "deploy" / "openapi.sh", *arguments], capture_output=True, text=True, timeout=120,
            env={**os.environ, "PORT": str(server.port), "VLLM_API_KEY": KEY},
        )
        for arguments in (["--raw"], [])
    )  # fmt: skip
    assert (raw.returncode, text.returncode) == (0, 0), raw.stderr + text.stderr
    choice = json.loads(raw.stdout)["choices"][0]
    assert choice["message"]["content"].strip()
    assert choice["finish_reason"] == "stop"
    assert "salt" in text.stdout and "{" not in text.stdout


def test_openapi_script_shows_a_refusal(server):
    asked = subprocess.run(
        ["sh", ROOT / "deploy" / "openapi.sh"], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PORT": str(server.port), "VLLM_API_KEY": "wrong"},
    )  # fmt: skip
    assert asked.returncode == 1
    assert "missing or wrong API key" in asked.stderr


def test_a_second_server_on_the_port_says_so(server):
    second = subprocess.run(
        [COMMAND, "serve"], env={**os.environ, "PORT": str(server.port)}, capture_output=True, text=True, timeout=60
    )
    assert second.returncode == 75
    assert f"port {server.port} on 127.0.0.1 is taken by process" in second.stderr
    assert "Traceback" not in second.stderr


def test_stopping_leaves_no_process(server):
    # The last test of this file: the server is gone after it.
    processes = family(server)
    assert len(processes) >= 3  # launcher, front end, engine
    server.stop()
    gone, alive = psutil.wait_procs(processes, timeout=60)
    assert alive == []
