"""What ray_head.sh, ray_worker.sh and ray_stop.sh would do on two nodes of eight H20s, read by Ray's own parser."""

import shlex
import socket
import sys
from types import SimpleNamespace

import psutil
import pytest
from typer.testing import CliRunner, Result

from hunyuan_vllm.cli import ray
from hunyuan_vllm.cluster.ray_node import NodeSetup
from hunyuan_vllm.cluster.ray_start import RayState
from hunyuan_vllm.util.errors import UserError

NODES = ("10.0.0.1", "10.0.0.2")
OLD_RAY = ["raylet (pid 77)", "gcs_server (pid 78)"]


@pytest.fixture
def node(monkeypatch, tmp_path):
    """A machine with both nodes' addresses and eight GPUs; what is there of Ray can be set."""
    there = SimpleNamespace(setup=None, processes=[], works=[])
    entries = [SimpleNamespace(address=address, family=socket.AF_INET) for address in NODES]
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"bond1": entries})
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("LOCAL_IP", "SOCKET_IFNAME", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        ray, "read_ray_state",
        lambda address: RayState(str(tmp_path), {}, 8, there.setup, there.processes, len(there.works), there.works),
    )  # fmt: skip
    for name in ("start", "stop"):
        monkeypatch.setattr(ray, name, lambda *_: pytest.fail("a dry run changed something"))
    return there


def dry_run(*words: str) -> Result:
    return CliRunner().invoke(ray.app, [*words, "--dry-run"])


def parsed(shown: str) -> tuple[dict[str, str], dict[str, object]]:
    """Variables and Ray's arguments of the command that was shown."""
    scripts = pytest.importorskip("ray.scripts.scripts", reason="Ray is not installed: sh deploy/setup_env.sh --test")
    words = shlex.split(shown.replace("\\\n", " "))
    ray = words.index("ray")
    assert words[0] == "env" and words[ray + 1] == "start"
    arguments = scripts.start.make_context("start", words[ray + 2 :]).params
    return dict(word.split("=", 1) for word in words[1:ray]), arguments


def test_two_nodes(node, tmp_path):
    head = dry_run("head", "--address", NODES[0])
    variables, arguments = parsed(head.stdout)
    assert variables["VLLM_HOST_IP"] == NODES[0] and variables["NCCL_SOCKET_IFNAME"] == "bond1"
    assert variables["RAY_AUTH_MODE"] == "token" and variables["RAY_AUTH_TOKEN_PATH"] == f"{tmp_path}/.ray/auth_token"
    assert (arguments["head"], arguments["port"], arguments["num_gpus"]) == (True, 6379, 8)
    assert arguments["include_dashboard"] is False
    variables, arguments = parsed(dry_run("worker", NODES[0], "--address", NODES[1], "--gpus", "4").stdout)
    assert variables["VLLM_HOST_IP"] == NODES[1] and variables["RAY_ADDRESS"] == f"{NODES[0]}:6379"
    assert (arguments["head"], arguments["address"], arguments["num_gpus"]) == (False, f"{NODES[0]}:6379", 4)
    assert list(tmp_path.iterdir()) == []  # no token was made


def test_what_is_there_already_is_said(node, tmp_path):
    node.processes = OLD_RAY
    old = dry_run("head", "--address", NODES[0])
    assert "an earlier Ray would be ended: raylet (pid 77)" in old.stderr and "ray start --head" in old.stdout
    node.works = ["an actor"]
    busy = dry_run("head", "--address", NODES[0])
    assert isinstance(busy.exception, UserError) and "used by an actor: stop that" in str(busy.exception)
    assert "ray start" in dry_run("head", "--address", NODES[0], "--force").stdout
    node.setup = NodeSetup(NODES[0], NODES[0], "bond1", 8, f"{tmp_path}/.ray/auth_token")
    same = dry_run("head", "--address", NODES[0])
    assert "nothing would be changed" in same.stderr and same.stdout == ""


def test_without_ray_no_token_is_left_behind(node, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    done = CliRunner().invoke(ray.app, ["head", "--address", NODES[0]])
    assert isinstance(done.exception, UserError) and "Ray is not installed" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_stop(node, monkeypatch):
    monkeypatch.setattr(ray, "ray_processes", lambda: [])
    assert "no Ray runs here" in dry_run("stop").stderr
    monkeypatch.setattr(ray, "ray_processes", lambda: [psutil.Process()])
    assert f"these would be ended: {ray.process_title(psutil.Process())}" in dry_run("stop").stderr
