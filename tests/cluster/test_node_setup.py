"""How Ray is started: flags, variables, ports; and that documents and systemd units say the same."""

import json
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from hunyuan_vllm.cluster.ray_node import PORTS, WORKER_PORTS, NodeSetup, checked_ports, fixed_ports, parse_variables
from hunyuan_vllm.ray_environment import NODE_DIRECTORY, cluster_variables, without_secrets
from hunyuan_vllm.util.errors import UserError

ROOT = Path(__file__).parents[2]
TOKEN = "/home/you/.ray/auth_token"
HEAD = NodeSetup("10.0.0.1", "10.0.0.1", "bond1", 8, TOKEN)
WORKER = NodeSetup("10.0.0.2", "10.0.0.1", "bond1", 8, TOKEN, "/tls", {"NCCL_IB_HCA": "mlx5"})


def test_flags():
    head, worker = HEAD.ray_arguments(), WORKER.ray_arguments()
    assert {"--head", "--port=6379", "--include-dashboard=false", "--no-monitor", "--num-gpus=8"} <= set(head)
    assert {"--address=10.0.0.1:6379", "--node-ip-address=10.0.0.2", "--node-manager-port=6380"} <= set(worker)
    assert not any(word.startswith(("--port", "--head", "--include-dashboard")) for word in worker)
    assert not any("token" in word for word in (*head, *worker))


def test_variables():
    environ = WORKER.environment()
    assert environ["VLLM_HOST_IP"] == "10.0.0.2" and environ["NCCL_SOCKET_IFNAME"] == "bond1"
    assert environ["RAY_AUTH_TOKEN_PATH"] == TOKEN and environ["RAY_AUTH_MODE"] == "token"
    assert environ["RAY_TLS_SERVER_KEY"] == "/tls/10.0.0.2.key" and environ["NCCL_IB_HCA"] == "mlx5"
    assert "RAY_USE_TLS" not in HEAD.environment()


def test_a_note_of_a_node_is_read_back():
    assert NodeSetup(**json.loads(json.dumps(asdict(WORKER)))) == WORKER
    assert NodeSetup("fd00::1", "fd00::1", "eth0", 1, "").gcs == "[fd00::1]:6379"


def test_secrets_are_left_out():
    kept = {"PATH": "/bin", "TOKENIZERS_PARALLELISM": "false", "NCCL_DEBUG": "INFO"}
    secrets = {
        "HF_TOKEN": "x",
        "VLLM_API_KEY": "x",
        "RAY_AUTH_TOKEN": "x",
        "HUNYUAN_SSH_PASSWORD": "x",
        "my_secret": "x",
        "SSH_AUTH_SOCK": "/tmp/agent",
    }
    assert without_secrets(kept | secrets) == kept


@pytest.mark.parametrize("word", ["x", "1A=b", "A B=c", "=x", "HF_TOKEN=x", "VLLM_HOST_IP=x", "RAY_USE_TLS=0"])
def test_variables_that_cannot_be_set(word):
    with pytest.raises(UserError, match="--env"):
        parse_variables([word])


def test_variables_that_can():
    assert parse_variables(["NCCL_IB_HCA=mlx5", "A=b=c", "EMPTY="]) == {"NCCL_IB_HCA": "mlx5", "A": "b=c", "EMPTY": ""}


def test_ports_do_not_overlap_and_are_never_the_systems_choice():
    numbers = [number for port in PORTS for number in range(port.first, port.last + 1)]
    assert len(numbers) == len(set(numbers)) and max(numbers) < 32768
    assert set(checked_ports()) == {*fixed_ports(head=True), WORKER_PORTS[0], WORKER_PORTS[-1]}
    assert fixed_ports(head=True).keys() - fixed_ports(head=False).keys() == {6379}


def test_the_document_lists_them():
    lines = (ROOT / "docs" / "security.md").read_text().splitlines()
    listed = [
        line.split("|")[1].strip() for line in lines if line.startswith("|") and ("refused" in line or "open |" in line)
    ]
    assert listed == [str(port) for port in PORTS]


@pytest.mark.parametrize("setup", [HEAD, WORKER])
def test_units_start_ray_alike(setup):
    name = "head" if setup.is_head else "worker"
    text = (ROOT / "deploy" / "systemd" / f"hunyuan-ray-{name}.service").read_text()
    fixed = [word for word in setup.ray_arguments() if "10.0.0" not in word and not word.startswith("--num-")]
    assert [word for word in fixed if word not in text] == []


def test_a_program_joins_the_node_that_was_started_here(tmp_path):
    address = next(entry.address for entry in psutil.net_if_addrs()["lo"] if "." in entry.address)
    setup = NodeSetup(address, "10.0.0.1", "lo", 1, "/t")
    directory = tmp_path / NODE_DIRECTORY
    directory.mkdir(parents=True)
    environ = {"RAY_TMPDIR": str(tmp_path)}
    (directory / f"node-{address}.json").write_text(json.dumps({"environment": setup.environment()}))
    assert cluster_variables(environ, tmp_path) == {}  # it does not run
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(setup.gcs)
    found = cluster_variables(environ, tmp_path)
    assert found | {"RAY_ADDRESS": setup.gcs} == setup.environment() and "RAY_ADDRESS" not in found
    mine = cluster_variables({**environ, "NCCL_SOCKET_IFNAME": "mine"}, tmp_path)
    assert "NCCL_SOCKET_IFNAME" not in mine and mine["RAY_AUTH_MODE"] == "token"
    assert cluster_variables({**environ, "RAY_ADDRESS": "10.0.0.7:6379"}, tmp_path) == {}
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.7:6379")
    assert cluster_variables(environ, tmp_path) == {}
