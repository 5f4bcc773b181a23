"""Running a server process: its status, its signals, the cause of its death, and that nothing of it is left."""

import collections
import json
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

from hunyuan_vllm.server import exit_cause as cause_module
from hunyuan_vllm.server.exit_cause import exit_cause, oom_kills
from hunyuan_vllm.util.errors import NotYetError, UserError
from hunyuan_vllm.util.net import check_port

RUNNER = """
import os, pathlib, sys
from hunyuan_vllm.server import supervisor
from hunyuan_vllm.server.launch import Launch
from hunyuan_vllm.server.process import Stop
from hunyuan_vllm.server.supervisor import run_once
from hunyuan_vllm.server.readiness import HealthStatus
key_file = pathlib.Path(os.environ["KEY_FILE"]) if "KEY_FILE" in os.environ else None
launch = Launch([sys.executable, "-c", sys.argv[1]], {"FROM_LAUNCH": "yes"}, "127.0.0.1", 8020, "hunyuan", key_file)
health = lambda launch: HealthStatus("ready" if os.path.exists(sys.argv[2]) else "silent")
sys.exit(run_once(launch, os.environ, Stop(), health))
"""
# As vLLM says it, with the exit code to fill in.
WORKER_DIED = (
    "(EngineCore pid=7) ERROR 11-30 09:00:00 [multiproc_executor.py:316] Worker proc VllmWorker-1 died unexpectedly "
    "(exit code: {}), shutting down executor."
)


# As psutil may for a process that is being reaped.
FIRST_WAIT_FAILS = """
import psutil
waits, wait_procs = [], psutil.wait_procs
def wait(*args, **kwargs):
    waits.append(args)
    if len(waits) == 1:
        raise psutil.ZombieProcess(1)
    return wait_procs(*args, **kwargs)
psutil.wait_procs = wait
"""


def start(program: str, ready_file: object = "/nonexistent", before: str = "", **streams: object) -> subprocess.Popen:
    argv = [sys.executable, "-c", before + RUNNER, textwrap.dedent(program), str(ready_file)]
    return subprocess.Popen(argv, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **streams})


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


def test_a_fatal_signal_is_named_and_becomes_the_shells_status():
    child = start("import os; os.kill(os.getpid(), 4)")
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 128 + 4
    assert "the API server was killed by SIGILL (exit status 132)" in errors


def test_a_process_that_is_being_reaped_is_waited_for_again():
    child = start("import subprocess; subprocess.Popen(['sleep', '600'])", before=FIRST_WAIT_FAILS)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 1 and "no error was logged" in errors and "Traceback" not in errors


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


@pytest.mark.parametrize("again", [False, True])
def test_a_start_that_ignores_the_stop_is_killed(again):
    """By the supervisor in time, or by the operator's second signal."""
    program = """
        import os, signal, time
        signal.signal(signal.SIGTERM, lambda *_: print("ignored", flush=True))
        print("starting", flush=True)
        while True:
            time.sleep(60)
    """
    runner = RUNNER if again else RUNNER.replace("key_file =", "supervisor.START_MARGIN = 0.5\nkey_file =", 1)
    argv = [sys.executable, "-c", runner, textwrap.dedent(program), "/nonexistent"]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "starting\n"
    child.send_signal(signal.SIGTERM)
    assert child.stdout.readline() == "ignored\n"
    if again:
        child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == (128 + signal.SIGKILL if again else 0), errors
    assert ("did not exit in time" in errors) is not again


@pytest.fixture(params=["full disk", "reader gone", "closed"])
def unwritable(request):
    """How to start a program of which nothing can be written: keywords of Popen."""
    if request.param == "closed":
        yield {"stdout": None, "stderr": None, "preexec_fn": lambda: (os.close(1), os.close(2))}
        return
    if request.param == "full disk":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, descriptor = os.pipe()
        os.close(reading)
    yield {"stdout": descriptor, "stderr": descriptor}
    os.close(descriptor)


def test_output_that_cannot_be_written_stops_neither_a_server_nor_its_drain(tmp_path, unwritable):
    program = f"""
        import os, pathlib, signal, sys, time
        directory = pathlib.Path({str(tmp_path)!r})
        def stop(number, frame):
            print("draining", flush=True)
            (directory / "drained").touch()
            sys.exit(0)
        signal.signal(signal.SIGTERM, stop)
        for number in range(10_000):
            print("a line of a log that is longer than the pipe", number, flush=True)
        (directory / "written").touch()
        time.sleep(600)
    """
    child = start(program, tmp_path / "written", **unwritable)
    eventually((tmp_path / "written").exists)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 0
    assert (tmp_path / "drained").exists()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_was_ignored_before_stays_ignored(number):
    """As nohup has it for SIGHUP, and a shell for SIGINT in background jobs."""
    program = """
        import time
        print("up", flush=True)
        time.sleep(600)
    """
    child = start(program, preexec_fn=lambda: signal.signal(number, signal.SIG_IGN))
    assert child.stdout.readline() == "up\n"
    child.send_signal(number)
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors  # a second signal would have killed it
    assert errors.count("stopping the server") == 1


def test_a_key_file_that_is_bad_when_the_server_becomes_ready_ends_nothing(tmp_path):
    key_file = tmp_path / "key"
    key_file.touch(mode=0o600)
    (tmp_path / "ready").touch()
    program = "import time; time.sleep(600)"
    child = start(program, tmp_path / "ready", env={**os.environ, "KEY_FILE": str(key_file)})
    assert "ready after" in "".join(child.stdout.readline() for _ in range(3))
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM
    assert f"{key_file} holds no key" in errors
    assert "Traceback" not in errors


def test_the_file_over_which_workers_meet_is_removed(tmp_path):
    own, other = (tmp_path / f"vllm_dist_{digit * 32}" for digit in "1f")
    other.touch()
    program = f"""
        open({str(own)!r}, "w")
        print("INFO [parallel_state.py:1907] world_size=1 rank=0 local_rank=0 "
              "distributed_init_method=file://{own} backend=gloo")
    """
    start(program).communicate(timeout=60)
    assert list(tmp_path.iterdir()) == [other]


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
        ([WORKER_DIED.format(-4), "RuntimeError: cancelled"], "process VllmWorker-1 was killed by SIGILL"),
        ([json.dumps({"message": WORKER_DIED.format(-11)}), "bye"], "process VllmWorker-1 was killed by SIGSEGV"),
        (["RuntimeError: CUDA error: unspecified launch failure", WORKER_DIED.format(-6), "RuntimeError: cancelled"],
         "process VllmWorker-1 was killed by SIGABRT: RuntimeError: CUDA error: unspecified launch failure"),
        (["ValueError: no memory", WORKER_DIED.format(1), "RuntimeError: cancelled"], "ValueError: no memory"),
        (["RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): "
          "{'EngineCore': 1, 'EngineCore_DP1': -7}"], "process EngineCore_DP1 was killed by SIGBUS"),
        ([WORKER_DIED.format(3), "RuntimeError: cancelled"], "process VllmWorker-1 ended unexpectedly (exit code 3)"),
        (["RayWorkerProc rank=[3] died unexpectedly, shutting down executor.", "RuntimeError: cancelled"],
         "Ray worker of rank 3 ended unexpectedly"),
        (["OSError: disk", "RuntimeError: Engine core initialization failed. See root cause above. "
          "Failed core proc(s): {'EngineCore_DP0': -15, 'EngineCore_DP1': 1}"], "OSError: disk"),
        ([WORKER_DIED.format(-99)], "process VllmWorker-1 was killed by signal 99"),
    ],
)  # fmt: skip
def test_cause_of_death(lines, cause):
    assert exit_cause(collections.deque(lines)) == cause


@pytest.mark.parametrize(
    ("oom_killed", "cause"),
    [
        (True, "process VllmWorker-1 was killed by SIGKILL: out of memory"),
        (None, "process VllmWorker-1 was killed by SIGKILL, likely for lack of memory (dmesg says)"),
        (False, "process VllmWorker-1 was killed by SIGKILL"),
    ],
)
def test_a_kill_is_the_kernels_where_its_count_has_grown(oom_killed, cause):
    assert exit_cause([WORKER_DIED.format(-9)], 1, oom_killed) == cause


def test_the_kernels_count_of_its_kills_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(cause_module, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(cause_module, "CGROUPS", tmp_path)
    monkeypatch.setattr(cause_module, "VMSTAT", tmp_path / "vmstat")
    assert oom_kills() is None
    (tmp_path / "vmstat").write_text("nr_free_pages 7\noom_kill 3\n")
    assert oom_kills() == 3
    (tmp_path / "cgroup").write_text("3:cpu:/x\n0::/a/b\n")
    assert oom_kills() == 3  # the group has no such controller
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/memory.events").write_text("low 0\nhigh 0\noom 1\noom_kill 1\n")
    assert oom_kills() == 1


def test_a_taken_port_names_its_holder():
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        said = rf"port {port} on 127\.0\.0\.1 is taken by process {os.getpid()} \(.+\): "
        with pytest.raises(NotYetError, match=said):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


def test_a_foreign_address_is_refused():
    with pytest.raises(UserError, match="not an address of this machine"):
        check_port("192.0.2.1", 8020)
