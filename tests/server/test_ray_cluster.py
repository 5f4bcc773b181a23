"""Finding a Ray cluster: none, one that is gone, one that cannot be asked. Ray itself is optional on a CPU machine."""

import json
import socket
import subprocess
import sys
from importlib.util import find_spec

import psutil
import pytest

from hunyuan_vllm.cluster import ray_nodes
from hunyuan_vllm.cluster.ray_nodes import RayNode
from hunyuan_vllm.server import ray_cluster
from hunyuan_vllm.server.ray_cluster import find_ray_cluster, kill_workers_here
from hunyuan_vllm.util.errors import NotYetError, UserError

GONE = "127.0.0.1:9"  # the discard port: nothing listens there


@pytest.fixture
def with_ray(monkeypatch):
    """Ray as far as its presence is looked up; what would import it is a process of its own."""
    monkeypatch.setattr(ray_cluster.importlib.util, "find_spec", lambda name: object())


def note(directory, address):
    (directory / "ray").mkdir()
    (directory / "ray" / "ray_current_cluster").write_text(address)


def test_no_cluster(with_ray, tmp_path):
    assert find_ray_cluster({"RAY_TMPDIR": str(tmp_path)}) is None
    assert find_ray_cluster({"RAY_TMPDIR": str(tmp_path), "RAY_ADDRESS": "auto"}) is None


def test_an_address_without_ray(monkeypatch):
    monkeypatch.setattr(ray_cluster.importlib.util, "find_spec", lambda name: None)
    assert find_ray_cluster({}) is None
    with pytest.raises(UserError, match="RAY_ADDRESS=10.0.0.5:6379 is set, but Ray is not installed"):
        find_ray_cluster({"RAY_ADDRESS": "10.0.0.5:6379"})


def test_a_cluster_that_is_gone(with_ray, tmp_path):
    note(tmp_path, GONE)
    with pytest.raises(NotYetError, match=rf"{GONE} \(Connection refused\): start it, or delete {tmp_path}"):
        find_ray_cluster({"RAY_TMPDIR": str(tmp_path)})
    with pytest.raises(NotYetError, match="start it, or unset RAY_ADDRESS"):
        find_ray_cluster({"RAY_ADDRESS": GONE})


@pytest.mark.parametrize("address", ["nonsense", "10.0.0.5:port"])
def test_an_address_that_is_none(with_ray, address):
    with pytest.raises(UserError, match=f"{address} is not the address of a Ray cluster"):
        find_ray_cluster({"RAY_ADDRESS": address})


def test_what_the_cluster_says(with_ray, monkeypatch):
    nodes = [
        {"address": "10.0.0.1", "gpus": 8, "free_gpus": 8, "alive": True},
        {"address": "10.0.0.2", "gpus": 8, "free_gpus": 0, "alive": True},
        {"address": "10.0.0.3", "gpus": 8, "free_gpus": 0, "alive": False},
    ]
    monkeypatch.setattr(ray_nodes, "LIST_NODES", f"print('noise'); print('RAY', {json.dumps(nodes)!r})")
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = find_ray_cluster({"RAY_ADDRESS": f"127.0.0.1:{server.getsockname()[1]}"})
    assert (len(found.alive), found.gpus, found.free_gpus) == (2, 16, 8)
    assert found.members[2] == RayNode("10.0.0.3", gpus=8, free_gpus=0, alive=False)


def test_a_refusal_is_passed_on(with_ray, monkeypatch):
    monkeypatch.setattr(ray_nodes, "LIST_NODES", "raise SystemExit('AuthenticationError: token is missing')")
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(UserError, match="AuthenticationError: token is missing"):
            find_ray_cluster({"RAY_ADDRESS": f"127.0.0.1:{server.getsockname()[1]}"})


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


@pytest.mark.skipif(
    not find_spec("ray") or not find_spec("setproctitle"), reason="Ray is not installed: pip install ray"
)
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
        said = kill_workers_here([process])
        assert process.is_running() is not ended
        assert said == ([f"{title} (pid {process.pid})"] if ended else [])
    finally:
        for one in (process, parent):
            if one is not None and one.is_running():
                one.kill()
