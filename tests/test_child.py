"""Running a server process: its status, its signals, the cause of its death, and that nothing of it is left."""

import collections
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from waiting import eventually

from hunyuan_vllm.errors import UserError
from hunyuan_vllm.server.child import cause_of_death
from hunyuan_vllm.server.ready import check_port

RUNNER = """
import os, sys
from hunyuan_vllm.server.launch import Launch
from hunyuan_vllm.server.stop import Stop
from hunyuan_vllm.server.supervise import run
from hunyuan_vllm.server.verdict import Verdict
launch = Launch([sys.executable, "-c", sys.argv[1]], {"FROM_LAUNCH": "yes"}, "127.0.0.1", 8020, "hunyuan")
ask = lambda launch: Verdict("ready" if os.path.exists(sys.argv[2]) else "silent")
sys.exit(run(launch, os.environ, Stop(), ask))
"""


def start(program: str, ready_file: object = "/nonexistent") -> subprocess.Popen:
    argv = [sys.executable, "-c", RUNNER, textwrap.dedent(program), str(ready_file)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_death_at_start_is_explained():
    program = """
        print("(EngineCore pid=7) ERROR 01-01 [core.py:1] ValueError: checkpoint tensor 'x' is missing")
        print("RuntimeError: Engine core initialization failed. See root cause above.")
        raise SystemExit(3)
    """
    child = start(program)
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 3
    assert "stopped before it was ready: ValueError: checkpoint tensor 'x' is missing" in errors
    assert "Engine core initialization failed" in output  # the server's own words are passed on


def test_a_silent_exit_is_a_failure_too():
    child = start("pass")
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 1
    assert "no error was logged (exit status 0)" in errors


def test_a_fatal_signal_becomes_the_shells_status():
    child = start("import os; os.kill(os.getpid(), 9)")
    child.communicate(timeout=60)
    assert child.returncode == 128 + 9


def is_over(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_the_server_and_leaves_nothing(tmp_path, number):
    # A server with a worker of its own that would outlive it.
    program = """
        import os, signal, subprocess, sys, time
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        def stop(number, frame):
            print("stopped by", number, os.environ["FROM_LAUNCH"], flush=True)
            os._exit(0)
        signal.signal(signal.SIGTERM, stop)
        print(worker.pid, flush=True)
        time.sleep(600)
    """
    ready = tmp_path / "ready"
    child = start(program, ready)
    worker = int(child.stdout.readline())
    ready.touch()
    announced = "".join(child.stdout.readline() for _ in range(3))
    assert "ready after" in announced
    assert "curl http://127.0.0.1:8020/v1/chat/completions" in announced
    child.send_signal(number)
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 0
    assert f"stopped by {int(signal.SIGTERM)} yes" in output
    assert "stopping the server" in errors
    eventually(lambda: is_over(worker))


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "raise SystemExit(1)", "os._exit(0)"])
def test_shared_memory_is_freed_whatever_ends_the_server(end):
    program = f"""
        import multiprocessing, os
        from multiprocessing.shared_memory import SharedMemory
        memory = SharedMemory(create=True, size=4096)
        print(memory.name, flush=True)
        {end}
    """
    child = start(program)
    name, _ = child.communicate(timeout=60)
    assert name.startswith("psm_")
    assert not os.path.exists(f"/dev/shm/{name.strip()}")


def test_shared_memory_that_another_made_is_freed(tmp_path):
    """As Ray's workers do, which are killed and free nothing."""
    block = Path(f"/dev/shm/psm_of_test_{os.getpid()}")
    block.write_bytes(bytes(4096))
    ready = tmp_path / "ready"
    program = f"""
        import mmap, os, pathlib, time
        with open({str(block)!r}, "r+b") as file:
            block = mmap.mmap(file.fileno(), 0)
        pathlib.Path({str(ready)!r}).touch()
        time.sleep(4)
        os._exit(1)
    """
    try:
        child = start(program, ready)
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 1, errors
        assert not block.exists()
    finally:
        block.unlink(missing_ok=True)


def test_a_second_signal_kills():
    program = """
        import signal, time
        signal.signal(signal.SIGTERM, lambda number, frame: print("busy", flush=True))
        print("up", flush=True)
        while True: time.sleep(1)
    """
    child = start(program)
    assert child.stdout.readline() == "up\n"
    child.send_signal(signal.SIGINT)
    assert child.stdout.readline() == "busy\n"
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    assert child.returncode == 128 + 9


def test_the_server_ends_with_a_killed_parent():
    child = start("import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    server = psutil.Process(int(child.stdout.readline()))
    child.kill()
    child.wait()
    server.wait(timeout=60)


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (["INFO all is well"], None),
        (["ValueError: a", "KeyError: 'b'"], "KeyError: 'b'"),
        (["(Worker_TP0 pid=3) ERROR 11-24 [x.py:9] torch.OutOfMemoryError: CUDA out of memory"],
         "torch.OutOfMemoryError: CUDA out of memory"),
        (["ValueError: no memory", "RuntimeError: Worker failed with error 'no memory'"], "ValueError: no memory"),
        (["OSError: disk", "RuntimeError: Engine core initialization failed. See root cause above."], "OSError: disk"),
        (['{"levelname": "ERROR", "message": "ValueError: no memory"}', '{"message": "bye"}'], "ValueError: no memory"),
        (['{"message": "failed", "exc_info": "Traceback …\\nOSError: disk"}', "{not JSON"], "OSError: disk"),
    ],
)  # fmt: skip
def test_cause_of_death(lines, cause):
    assert cause_of_death(collections.deque(lines)) == cause


def test_a_taken_port_names_its_holder():
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} on 127\.0\.0\.1 is taken by process {os.getpid()} \(.+\): "):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


def test_a_foreign_address_is_refused():
    with pytest.raises(UserError, match="not an address of this machine"):
        check_port("192.0.2.1", 8020)
