"""Which processes are stale Ray workers: those with a worker's title and library whose raylet has exited."""

import subprocess
import sys

import psutil
import pytest

from hunyuan_vllm.server.stale_workers import kill_stale_workers

pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
pytest.importorskip("setproctitle", reason="vLLM's setproctitle is not installed")
# Starts a worker and says its pid; ends at once, or stays the worker's parent.
PARENT = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, start_new_session=True)
worker.stdout.readline()
print(worker.pid, flush=True)
time.sleep(float(sys.argv[2]))
"""
WORKER = (
    "{library}; import setproctitle, time; setproctitle.setproctitle('{title}'); print(flush=True); time.sleep(600)"
)
RAYS, OTHER = "import ray._raylet", "import json"


def started(title: str, library: str, orphaned: bool) -> psutil.Process:
    worker = WORKER.format(title=title, library=library)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, worker, "0" if orphaned else "600"], stdout=subprocess.PIPE, text=True
    )
    process = psutil.Process(int(parent.stdout.readline()))
    if orphaned:
        parent.wait()
    return process


@pytest.mark.parametrize(
    ("title", "library", "orphaned", "ended"),
    [
        ("ray::RayWorkerProc", RAYS, True, True),
        ("ray::RayWorkerProc", RAYS, False, False),
        ("ray::RayWorkerProc", OTHER, True, False),
        ("a notebook that uses ray::", RAYS, True, False),
    ],
)
def test_who_is_an_orphan(title, library, orphaned, ended):
    process = started(title, library, orphaned)
    parent = None if orphaned else process.parent()
    try:
        if orphaned and process.ppid() != 1:
            pytest.skip("orphans here become children of another process than init")
        said = kill_stale_workers([process])
        assert process.is_running() is not ended
        assert said == ([f"{title} (pid {process.pid})"] if ended else [])
    finally:
        for one in (process, parent):
            if one is not None and one.is_running():
                one.kill()
