"""The Kubernetes manifests: what pods run, and whether ports, probes and times are those of our code."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from manifests import ADDRESS, NAMESPACE, container, named, objects, pods, replica_pods, templates, variables
from waiting import eventually

from hunyuan_vllm import envs
from hunyuan_vllm.cluster.ray_node import PORTS, TOKEN_VARIABLE, NodeSetup
from hunyuan_vllm.envs import DEFAULT_PORT, KEY_FILE_VARIABLE, Settings
from hunyuan_vllm.server.middleware import health
from hunyuan_vllm.util.net import INTERFACE_VARIABLES

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()
SHELLCHECK = Path(sys.executable).with_name("shellcheck")


def test_the_server_gets_what_it_reads():
    settings = Settings.read(variables("leader"))
    size = named("LeaderWorkerSet", "hunyuan")["spec"]["leaderWorkerTemplate"]["size"]
    assert settings.tp_size == size * int(container("leader")["resources"]["limits"]["nvidia.com/gpu"])
    assert settings.local_ip and str(settings.api_key_file) == variables("leader")[KEY_FILE_VARIABLE]
    for role in ("leader", "worker"):
        address = [one for one in container(role)["env"] if one["name"] == "LOCAL_IP"]
        assert address[0]["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}


def test_the_server_joins_ray_as_ray_was_started():
    given = variables("leader")
    setup = NodeSetup(ADDRESS, ADDRESS, "eth0", 8, given[TOKEN_VARIABLE])
    found_by_the_server = {"VLLM_HOST_IP", *INTERFACE_VARIABLES}
    wanted = {name: value for name, value in setup.environment().items() if name not in found_by_the_server}
    assert {name: value for name, value in given.items() if name.startswith("RAY_")} == wanted
    assert variables("worker")[TOKEN_VARIABLE] == given[TOKEN_VARIABLE]


@pytest.mark.parametrize("role", ["leader", "worker"])
def test_commands_are_what_the_scripts_run(role):
    script = (ROOT / "deploy" / {"leader": "ray_head.sh", "worker": "ray_worker.sh"}[role]).read_text()
    (module, side) = re.search(r"-m (\S+) (\w+)", script).groups()
    shell, flag, command = container(role)["command"]
    assert flag == "-c" and f"python3 -m {module} {side}" in command
    if role == "leader":
        assert command.endswith("&& exec hunyuan-vllm serve"), "the server gets the signals"
    checked = subprocess.run([SHELLCHECK, "-s", shell, "-"], input=command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_a_worker_joins_when_its_leader_is_there_and_ends_with_its_ray(tmp_path):
    # Stand-ins for the name server and for Ray, which fails until its head is there.
    programs = {
        "getent": "[ -e tried ] && echo '10.0.0.4  STREAM hunyuan-0'; touch tried",
        "python3": 'echo "$@" >>asked; [ "$(wc -l <asked)" -gt 1 ]',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LWS_LEADER_ADDRESS": "hunyuan-0", "LOCAL_IP": "127.0.0.1"}
    with socket.create_server(("127.0.0.1", 0)) as ray:
        command = [*container("worker")["command"]]
        command[-1] = command[-1].replace("6380", str(ray.getsockname()[1])).replace("sleep 5", "sleep 0.1")
        worker = subprocess.Popen(command, env=environ, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        asked = tmp_path / "asked"
        eventually(lambda: asked.exists() and asked.read_text().count("\n") == 2)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(timeout=1)
    assert worker.wait(timeout=20) == 1 and "Ray has ended" in worker.stderr.read()
    assert (tmp_path / "asked").read_text() == "-m hunyuan_vllm.cli.ray worker 10.0.0.4\n" * 2


def test_a_workers_probes_ask_its_ray():
    (node_manager,) = [port.first for port in PORTS if port.name == "node manager"]
    worker = container("worker")
    assert worker["ports"] == [{"name": "ray-node", "containerPort": node_manager}]
    assert f"/dev/tcp/$LOCAL_IP/{node_manager}" in worker["command"][-1]
    assert {worker[probe]["tcpSocket"]["port"] for probe in ("startupProbe", "readinessProbe")} == {"ray-node"}
    limit = worker["startupProbe"]["periodSeconds"] * worker["startupProbe"]["failureThreshold"]
    assert limit >= int(variables("leader")["GPU_WAIT"])


def test_the_servers_port_is_one_everywhere():
    leader, service = replica_pods()[0, 0], named("Service", "hunyuan-replicas")["spec"]
    assert leader.ports["http"] == DEFAULT_PORT
    assert re.search(r"PORT=(\d+)", DOCKERFILE)[1] == str(DEFAULT_PORT)
    assert [(port["port"], port["targetPort"]) for port in service["ports"]] == [(DEFAULT_PORT, "http")]
    assert variables("router")["REPLICAS_DNS"] == f"hunyuan-replicas.{NAMESPACE}.svc.cluster.local:{DEFAULT_PORT}"


def test_services_select_leaders_and_routers():
    headless, front = named("Service", "hunyuan-replicas")["spec"], named("Service", "hunyuan-router")["spec"]
    assert headless["clusterIP"] == "None" and "publishNotReadyAddresses" not in headless
    chosen = {place for place, pod in replica_pods().items() if headless["selector"].items() <= pod.labels.items()}
    assert chosen == {place for place in replica_pods() if place[1] == 0}
    router = pods(templates()["router"])
    assert front["selector"].items() <= router.labels.items()
    assert [port["targetPort"] for port in front["ports"]] == ["https"]
    assert named("LeaderWorkerSet", "hunyuan")["metadata"]["name"] not in {
        one["metadata"]["name"] for one in objects() if one["kind"] == "Service"
    }, "LeaderWorkerSet makes a service of its own name"


def test_probes_ask_what_the_server_answers():
    leader = container("leader")
    for name, path in (("startup", health.READY), ("readiness", health.READY), ("liveness", health.LIVE)):
        assert leader[f"{name}Probe"]["httpGet"] == {"path": path, "port": "http"}
        patient = name == "liveness" or leader[f"{name}Probe"]["timeoutSeconds"] >= envs.ready_timeout()
        assert patient, "a probe waits as long as /readyz may take"
    assert leader["startupProbe"]["periodSeconds"] * leader["startupProbe"]["failureThreshold"] >= 40 * 60


def test_the_routers_ports_are_those_it_listens_on():
    listening = {name: variables("router")[name].rpartition(":")[2] for name in ("ROUTER_BIND", "ROUTER_STATUS")}
    assert {name: str(port) for name, port in pods(templates()["router"]).ports.items()} == {
        "https": listening["ROUTER_BIND"], "status": listening["ROUTER_STATUS"],
    }  # fmt: skip
    config = (ROOT / "deploy/router/haproxy.cfg").read_text()
    assert set(variables("router")) <= set(re.findall(r"[A-Z]+_[A-Z0-9]+", config))
    for probe in ("readinessProbe", "livenessProbe"):
        check = container("router")[probe]["httpGet"]
        assert check["port"] == "status" and f"path {check['path']} " in config


def test_a_worker_stays_until_its_leader_has_stopped_listening():
    command = container("worker")["lifecycle"]["preStop"]["exec"]["command"]
    assert command[0] == "timeout" and int(command[1]) > envs.drain_grace()
    with socket.create_server(("127.0.0.1", 0)) as leader:
        script = command[-1].replace(f"/{DEFAULT_PORT}", f"/{leader.getsockname()[1]}")
        assert script != command[-1]
        waiting = subprocess.Popen([*command[:-1], script], env={**os.environ, "LWS_LEADER_ADDRESS": "127.0.0.1"})
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(timeout=2)
    assert waiting.wait(timeout=20) == 0


def test_there_is_time_to_drain():
    spec = templates()["leader"]["spec"]
    before = container("leader")["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] >= before + envs.drain_grace() + 30
    assert templates()["worker"]["spec"]["terminationGracePeriodSeconds"] >= spec["terminationGracePeriodSeconds"]
