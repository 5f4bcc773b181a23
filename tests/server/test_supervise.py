"""The supervisor around programs that stand for a server: they die at once, hang, or leave processes behind."""

import os
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest
from serving import free_port

SUPERVISOR = """
import os, sys
from hunyuan_vllm.server.launch import Launch
from hunyuan_vllm.server.process import Stop
from hunyuan_vllm.server.supervisor import RestartPolicy, supervise
program, port, hang_timeout, max_restarts, first = sys.argv[1:]
launch = Launch([sys.executable, "-c", program, port], {}, "127.0.0.1", int(port), "hunyuan")
policy = RestartPolicy(10, float(hang_timeout), int(max_restarts), first_wait=float(first))
sys.exit(supervise(launch, os.environ, Stop(), policy))
"""
# A server whose /readyz says {status} once it has been asked {times} times, and "ready" before.
SERVER = """
import http.server, json, os, subprocess, sys, time
asked = 0
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global asked
        asked += 1
        status = "ready" if asked <= {times} else "{status}"
        if status == "silent": time.sleep(600)
        body = json.dumps({{"status": status, "reason": "as it is told"}}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *words): pass
worker = subprocess.Popen([sys.executable, "-c", "import os, time; os.setsid(); time.sleep(600)"])
print("run", os.environ["HUNYUAN_VLLM_SUPERVISOR_RESTARTS"], "worker", worker.pid, flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def start():
    started = []

    def start(program, hang_timeout=1.0, max_restarts=3, first_wait=0.1, **environ):
        argv = [sys.executable, "-c", SUPERVISOR, textwrap.dedent(program), str(free_port()), str(hang_timeout)]
        supervisor = subprocess.Popen(
            [*argv, str(max_restarts), str(first_wait)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "HUNYUAN_VLLM_READY_TIMEOUT": "0.2", **environ},
        )  # fmt: skip
        started.append(supervisor)
        return supervisor

    yield start
    for supervisor in started:
        if supervisor.poll() is None:
            supervisor.kill()


def test_a_crash_loop_says_why_waits_longer_and_gives_up(start):
    supervisor = start("raise ValueError('no such thing')")
    _, errors = supervisor.communicate(timeout=60)
    assert supervisor.returncode == os.EX_UNAVAILABLE
    assert errors.count("the server died before it was ready: ValueError: no such thing (exit status 1)") == 4
    assert [f"restart {n}" in errors for n in (1, 2, 3, 4)] == [True, True, True, False]
    assert "giving up after 4 failures in a row" in errors


@pytest.mark.parametrize("variable", ["TMPDIR", "VLLM_RPC_BASE_PATH"])
def test_a_directory_that_was_removed_is_made_again(start, tmp_path, variable):
    directory = tmp_path / "directory"
    program = (
        f"import os; print('there:', os.path.isdir({str(directory)!r}), flush=True); os.rmdir({str(directory)!r}); "
        "os._exit(1)"
    )
    supervisor = start(program, max_restarts=2, **{variable: str(directory)})
    output, errors = supervisor.communicate(timeout=60)
    assert supervisor.returncode == os.EX_UNAVAILABLE, errors
    assert output.count("there: True") == 3
    assert errors.count(f"{variable}={directory} did not exist and has been created") == 3


def test_a_directory_that_cannot_be_made_is_named_and_tried_again(start, tmp_path):
    (tmp_path / "file").touch()
    directory = tmp_path / "file" / "directory"
    supervisor = start("raise SystemExit(1)", max_restarts=1, VLLM_RPC_BASE_PATH=str(directory))
    _, errors = supervisor.communicate(timeout=60)
    assert supervisor.returncode == os.EX_UNAVAILABLE, errors
    reason = "is not a directory and cannot be created: Not a directory"
    assert errors.count(f"VLLM_RPC_BASE_PATH={directory} {reason}") == 2


def test_wrong_options_are_not_tried_again(start):
    supervisor = start("import sys; print('error: argument --nonsense'); sys.exit(2)")
    _, errors = supervisor.communicate(timeout=60)
    assert supervisor.returncode == 2
    assert "vLLM does not accept these options" in errors
    assert "restart" not in errors


@pytest.mark.parametrize(("status", "runs"), [("stalled", 2), ("silent", 1)])
def test_a_server_that_hangs_is_replaced_and_nothing_of_it_is_left(start, status, runs):
    # Its worker has a session of its own: it is found as a child of the supervisor, which adopts orphans.
    supervisor = start(SERVER.format(times=1, status=status), max_restarts=runs - 1)
    output, errors = supervisor.communicate(timeout=90)
    assert supervisor.returncode == os.EX_UNAVAILABLE
    workers = [int(line.split()[-1]) for line in output.splitlines() if line.startswith("run ")]
    assert len(workers) == runs
    assert errors.count("it hangs: ") == runs
    assert not any(map(psutil.pid_exists, workers))


def test_a_death_in_service_is_followed_by_a_restart_and_a_stop_ends_it(start):
    supervisor = start(SERVER.format(times=10**6, status="ready"))
    supervisor.stdout.readline()
    assert "ready after" in "".join(supervisor.stdout.readline() for _ in range(3))
    (server,) = psutil.Process(supervisor.pid).children()
    server.kill()
    while not (line := supervisor.stdout.readline()).startswith("run 1"):
        assert line  # the output has not ended
    worker = int(line.split()[-1])
    while "ready after" not in supervisor.stdout.readline():
        pass
    supervisor.send_signal(signal.SIGTERM)
    _, errors = supervisor.communicate(timeout=30)
    assert supervisor.returncode == 128 + signal.SIGTERM  # this server just dies of it
    assert "s of service: the API server was killed by SIGKILL" in errors
    assert "(exit status 137); restart 1 in 0 s" in errors
    assert not psutil.pid_exists(worker)


def test_a_stop_ends_the_wait_for_the_next_start(start):
    supervisor = start("raise SystemExit(1)", first_wait=60)
    assert any("restart 1 in 60 s" in line for line in supervisor.stderr)
    supervisor.send_signal(signal.SIGTERM)
    supervisor.communicate(timeout=30)
    assert supervisor.returncode == 0
