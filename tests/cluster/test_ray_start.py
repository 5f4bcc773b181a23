"""`ray start` that fails, hangs or is interrupted leaves no process behind."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hunyuan_vllm.cluster import ray_start
from hunyuan_vllm.cluster.hosts import HostError
from hunyuan_vllm.cluster.ray_node import NodeSetup
from hunyuan_vllm.cluster.ray_start import run_ray

SETUP = NodeSetup("127.0.0.1", "127.0.0.1", "lo", 0, "/token")
# Starts a daemon as Ray starts its GCS, writes its number to a file, and ends as a test wants.
RAY = """#!{python}
import pathlib, subprocess, sys, time
daemon = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path({pid_file!r}).write_text(str(daemon.pid))
print("RuntimeError: the raylet did not start")
{end}
"""


@pytest.fixture
def ray(tmp_path, monkeypatch):
    """Makes `run_ray` start a stand-in; the returned function gives its daemon."""
    program, pid_file = tmp_path / "ray", tmp_path / "pid"
    monkeypatch.setattr(ray_start, "find_ray", lambda: program)
    monkeypatch.setattr(ray_start, "ray_processes", lambda: [])  # another Ray of this user is not this test's
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))

    def install(end: str) -> Path:
        program.write_text(RAY.format(python=sys.executable, pid_file=str(pid_file), end=end))
        program.chmod(0o755)
        return pid_file

    yield install
    if pid_file.exists() and psutil.pid_exists(int(pid_file.read_text())):
        psutil.Process(int(pid_file.read_text())).kill()


def runs(pid_file: Path) -> bool:
    try:
        return psutil.Process(int(pid_file.read_text())).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_failure_ends_what_was_started(ray):
    pid_file = ray("sys.exit(1)")
    with pytest.raises(HostError, match="exit status 1.*the raylet did not start"):
        run_ray(SETUP)
    assert not runs(pid_file)


def test_a_hang_ends_what_was_started(ray, monkeypatch):
    pid_file = ray("time.sleep(600)")
    monkeypatch.setattr(ray_start, "START_TIMEOUT", 5.0)
    with pytest.raises(HostError, match="no answer in 5 s"):
        run_ray(SETUP)
    assert not runs(pid_file)


def test_an_interruption_ends_what_was_started(ray, tmp_path):
    pid_file = ray("time.sleep(600)")
    code = (
        "import pathlib; from hunyuan_vllm.cluster import ray_start; NodeSetup = ray_start.NodeSetup;"
        f"ray_start.find_ray = lambda: pathlib.Path({str(tmp_path / 'ray')!r}); ray_start.ray_processes = lambda: [];"
        f"ray_start.run_ray({SETUP!r})"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not pid_file.exists() or not pid_file.read_text():
        time.sleep(0.05)
    starter.send_signal(signal.SIGINT)
    assert starter.wait(30) != 0
    assert not runs(pid_file)


def test_what_a_start_that_works_leaves_running_is_kept(ray):
    pid_file = ray("")
    run_ray(SETUP)
    assert runs(pid_file)
