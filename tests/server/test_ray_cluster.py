"""Finding a Ray cluster: none, one that is gone, one that cannot be asked. Ray itself is optional on a CPU machine."""

import json
import socket

import pytest

from hunyuan_vllm.cluster.ray_nodes import RayNode
from hunyuan_vllm.server import ray_cluster
from hunyuan_vllm.server.ray_cluster import find_ray_cluster
from hunyuan_vllm.util.errors import NotYetError, UserError

GONE = "127.0.0.1:9"  # the discard port: nothing listens there


@pytest.fixture
def with_ray(monkeypatch):
    """Ray as far as its presence is looked up; what would import it is a process of its own."""
    monkeypatch.setattr(ray_cluster.importlib.util, "find_spec", lambda name: object())


def note(folder, address):
    (folder / "ray").mkdir()
    (folder / "ray" / "ray_current_cluster").write_text(address)


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


@pytest.mark.parametrize("address", ["{}", "ray://{}"])
def test_what_the_cluster_says(with_ray, monkeypatch, address):
    nodes = [
        {"address": "10.0.0.1", "gpus": 8, "free_gpus": 8, "alive": True},
        {"address": "10.0.0.2", "gpus": 8, "free_gpus": 0, "alive": True},
        {"address": "10.0.0.3", "gpus": 8, "free_gpus": 0, "alive": False},
    ]
    monkeypatch.setattr(ray_cluster, "PROBE", f"print('noise'); print('RAY', {json.dumps(nodes)!r})")
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = find_ray_cluster({"RAY_ADDRESS": address.format(f"127.0.0.1:{server.getsockname()[1]}")})
    assert (found.nodes, found.gpus, found.free_gpus) == (2, 16, 8)
    assert found.members[2] == RayNode("10.0.0.3", gpus=8, free_gpus=0, alive=False)


def test_a_refusal_is_passed_on(with_ray, monkeypatch):
    monkeypatch.setattr(ray_cluster, "PROBE", "raise SystemExit('AuthenticationError: token is missing')")
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(UserError, match="AuthenticationError: token is missing"):
            find_ray_cluster({"RAY_ADDRESS": f"127.0.0.1:{server.getsockname()[1]}"})
