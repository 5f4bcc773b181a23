"""Which processes are Ray's: those that write into a session of its, and their children; not those with such a name."""

import os
import subprocess
import sys
from contextlib import ExitStack

import pytest

from hunyuan_vllm.cluster.processes import end_processes, ray_processes, workloads

NAP = "import sys, time; print(1, flush=True); time.sleep(600)"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {NAP!r}], start_new_session=True)"
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"


@pytest.fixture
def session(tmp_path):
    """A directory such as Ray makes; processes of other tests are in others."""
    directory = tmp_path / "session_2026-01-02_03-04-05_678901_42" / "logs"
    directory.mkdir(parents=True)
    return directory


@pytest.fixture
def started():
    """Starts programs, and ends them with the test."""
    with ExitStack() as stack:

        def start(script: str, name: str = sys.executable, **options) -> subprocess.Popen:
            options = {"stdout": subprocess.PIPE, **options}
            process = subprocess.Popen([name, "-c", script], executable=sys.executable, **options)
            stack.callback(process.wait)
            stack.callback(process.kill)
            if options["stdout"] == subprocess.PIPE:
                assert process.stdout.readline()
            return process

        yield start


def test_found_by_what_they_write_and_ended_with_their_children(session, started):
    with (session / "worker.out").open("w+") as log:
        worker = started(PARENT, stdout=log)
        stubborn = started(STUBBORN, stderr=log)
        while not (session / "worker.out").read_text():  # its child is there
            pass
    reader = started(NAP, stdin=(session / "worker.out").open())
    titled = started(NAP, "VLLM::Worker_TP0")
    found = {process.pid for process in ray_processes()}
    assert {worker.pid, stubborn.pid} <= found
    assert not {reader.pid, titled.pid, os.getpid()} & found

    def mine():
        return [one for one in ray_processes() if one.pid in family or one.ppid() in family]

    family = {worker.pid, stubborn.pid}
    family |= {one.pid for one in mine()}
    assert len(family) == 3
    ended, stuck = end_processes(mine)
    assert (len(ended), stuck) == (3, [])
    assert worker.poll() is not None and stubborn.poll() is not None  # the latter only by force
    assert reader.poll() is titled.poll() is None
    assert end_processes(mine) == ([], [])


def test_a_driver_counts_as_use_though_it_runs_nothing(session, started):
    with (session / "python-core-driver-01000000ffff_42.log").open("w") as log:
        notebook = started(NAP, stderr=log)
    with (session / "python-core-worker-0123_43.log").open("w") as log:
        idle = started(NAP, "ray::IDLE", stderr=log)
        busy = started(NAP, "ray::Worker.run", stderr=log)
    mine = [one for one in ray_processes() if one.pid in (notebook.pid, idle.pid, busy.pid)]
    assert len(mine) == 3
    driver, actor = sorted(workloads(mine), reverse=True)
    assert driver.startswith("the driver ") and f"(pid {notebook.pid})" in driver
    assert actor.startswith("ray::Worker.run")
