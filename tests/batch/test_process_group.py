"""Whatever ends one of a run's processes, none is left behind; and Ctrl-C reaches one of them, once."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

SCRIPT = """
import signal, subprocess, sys, time
from hunyuan_vllm.batch.process_group import run_in_session

def run():
    signal.signal(signal.SIGINT, lambda *_: print("child: SIGINT", flush=True))
    code = "import signal, time; signal.signal(signal.SIGINT, lambda *_: print('engine: SIGINT', flush=True)); "
    engine = subprocess.Popen([sys.executable, "-c", code + "print('ready', flush=True); time.sleep(120)"])
    if "return" in sys.argv:
        return 7
    time.sleep(120)

sys.exit(run_in_session(run))
"""


@pytest.fixture
def guard():
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.stdout.close()


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """The guard, the run and its engine."""
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


@pytest.mark.parametrize(
    ("at", "how", "status"), [(0, signal.SIGKILL, -9), (1, signal.SIGKILL, 137), (1, signal.SIGABRT, 134)]
)
def test_none_outlives_another(guard, at, how, status):
    processes = family(guard)
    assert len(processes) == 3
    processes[at].send_signal(how)
    assert guard.wait(timeout=60) == status
    gone, alive = psutil.wait_procs(processes, timeout=60)
    assert alive == []


def test_sigterm_ends_all(guard):
    processes = family(guard)
    guard.terminate()
    assert guard.wait(timeout=60) == 137
    assert psutil.wait_procs(processes, timeout=60)[1] == []


def test_ctrl_c_reaches_the_run_alone_and_once(guard):
    os.killpg(guard.pid, signal.SIGINT)  # as a terminal does, to all processes in front of it
    assert guard.stdout.readline() == "child: SIGINT\n"
    time.sleep(0.5)
    guard.kill()
    assert guard.stdout.read() == ""


def test_the_status_is_the_run_s():
    ran = subprocess.run([sys.executable, "-c", SCRIPT, "return"], capture_output=True, timeout=30)
    assert ran.returncode == 7
