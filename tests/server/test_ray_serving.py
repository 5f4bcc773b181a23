"""A server over two hosts by Ray, as its users, its operator and strangers in the network meet it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from engine import engine, random_prompts, score
from ray_hosts.cluster import ON_CPUS, SHELL
from ray_hosts.fault_run import inject_fault, reference
from ray_hosts.faults import FAULTS, pause_raylet_in_load
from ray_service import CANARIES, RayService

from hunyuan_vllm import demo
from hunyuan_vllm.cluster.ray_node import WORKER_PORTS, fixed_ports

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.server, pytest.mark.slow]
PROMPT_LENGTHS = (5, 16, 33, 64)
TOKENS = 24
TOLD = 60.0  # seconds until each client knows of a fault: a silent host is given up after 25
PAUSED = "kill -9 of a worker process"
RECOVERED = 300.0  # a bound for hangs; benchmarks/ray_faults.py measures


PROGRAM = f"""
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(
        model={str(demo.path())!r}, tensor_parallel_size=2, distributed_executor_backend="ray", dtype="float32",
        enforce_eager=True, kv_cache_memory_bytes=2**26, max_model_len=256,
    )
    answer = llm.chat([{{"role": "user", "content": "Hello"}}], SamplingParams(max_tokens=4, temperature=0))
    print("ANSWER", answer[0].outputs[0].token_ids)
"""


def test_a_program_joins_the_cluster_by_itself(ray_service_of_module: RayService):
    """vLLM's own `LLM` (a batch run joins by the same code), in a shell that knows nothing of the token and the
    interfaces. First in this file: a server has all GPUs."""
    ray_service_of_module.bring_up_nodes()
    head = ray_service_of_module.cluster.head
    head.run("tee", "/root/program.py", input=PROGRAM)
    done = head.run(sys.executable, "/root/program.py", env=SHELL | ON_CPUS, timeout=540, check=False)
    assert done.returncode == 0 and "ANSWER" in done.stdout, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def on_one_rank():
    """The same prompts, answered by an engine in this process that has all of the model."""
    with engine(demo.path(), max_model_len=256) as llm:
        prompts = random_prompts(llm.model_config.get_vocab_size(), PROMPT_LENGTHS)
        return prompts, score(llm, prompts, TOKENS, prompt_logprobs=False)


def test_tokens_are_those_of_one_rank(on_one_rank, ray_service: RayService):
    prompts, expected = on_one_rank
    body = {"model": "hunyuan", "prompt": prompts, "max_tokens": TOKENS, "temperature": 0, "repetition_penalty": 1}
    answer = ray_service.server.post(
        "/v1/completions", {**body, "logprobs": 0, "return_token_ids": True, "ignore_eos": True}
    )
    assert answer["status"] == 200, answer
    choices = answer["body"]["choices"]
    assert [choice["token_ids"] for choice in choices] == [one.tokens for one in expected]
    for choice, one in zip(choices, expected, strict=True):
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(one.logprobs, abs=1e-4)


def test_the_ranks_talk_over_the_network(ray_service: RayService):
    log = ray_service.server.log
    assert log.count("CPU SHM communicator disabled for group tp:0") == 2
    assert f"ip={ray_service.cluster.worker.address}" in log  # where Ray says that one of the two is
    for host in (ray_service.cluster.head, ray_service.cluster.worker):
        assert host.sh("ps -eo args").count("ray::RayWorkerProc") == 1


def test_ranks_have_the_niceness_of_ray_itself(ray_service: RayService):
    """By default its workers come after all else on a node."""
    for host in (ray_service.cluster.head, ray_service.cluster.worker):
        niceness = dict(line.split()[1::-1] for line in host.sh("ps -eo ni=,comm=").splitlines() if "ray" in line)
        assert niceness["ray::RayWorkerP"] == niceness["raylet"]


def test_strangers_are_refused(ray_service: RayService):
    for name, output in ray_service.what_strangers_got().items():
        assert "LET IN" not in output and "Ray runtime started" not in output, name
        assert "uthentication" in output or "uthoriz" in output, (name, output[-2000:])
    assert ray_service.nodes() == [ray_service.cluster.head.address, ray_service.cluster.worker.address]


def test_no_secret_can_be_read(ray_service: RayService):
    cluster = ray_service.cluster
    secrets = {"token": cluster.token, "API key": ray_service.server.key(), **CANARIES}
    assert not any(secret in ray_service.server.log for secret in secrets.values())
    for host in (cluster.head, cluster.worker):
        report = ray_service.find_secrets(host, secrets)
        assert any(name.startswith("ray::RayWorkerProc") for name in report["processes"])  # it was looked into
        found = {(name, place) for name, place in report["found"]}
        # The token is what a worker speaks to Ray with, and the server inherited what its operator had exported.
        allowed = {(name, place) for name, place in found if name == "token" and place.startswith("memory of ray::")}
        if host is cluster.head:
            allowed |= {(name, place) for name, place in found if name in CANARIES and place.startswith("environ of")}
        assert found - allowed == set()
        assert allowed  # what is there to be found is found


def test_open_ports_are_the_documented_ones(ray_service: RayService):
    """docs/security.md: Ray's of the table, the server's, and those that vLLM's ranks take of the system's range."""
    cluster = ray_service.cluster
    for host in (cluster.head, cluster.worker):
        allowed = {*fixed_ports(host is cluster.head), *WORKER_PORTS} | ({8020} if host is cluster.head else set())
        first, last = map(int, host.sh("cat /proc/sys/net/ipv4/ip_local_port_range").split())
        open_ports = set()
        for line in host.sh("ss -Hltnp").splitlines():
            address, _, port = line.split()[3].rpartition(":")
            if address.strip("[]").removeprefix("::ffff:").startswith("127.") or address == "[::1]":
                continue
            ranks = first <= int(port) <= last and ("ray::RayWorkerP" in line or "VLLM::" in line)
            assert int(port) in allowed or ranks, f"{host.name}: {line}"
            open_ports.add(int(port))
        assert open_ports >= {number for number, port in fixed_ports(host is cluster.head).items() if not port.extra}


def test_the_published_request_is_answered(ray_service: RayService):
    """deploy/openapi.sh on the head, told no more than the server was."""
    head = ray_service.cluster.head
    asked = ["sh", ROOT / "deploy" / "openapi.sh", "--raw", "Why is sea water salty?"]
    done = head.run(*asked, env={**SHELL, "LOCAL_IP": head.address}, timeout=120)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


# Last: what is lost and comes back. In this file, because each file with this cluster would start one of its own.


@pytest.mark.parametrize("kind", FAULTS)
def test_clients_are_told_and_the_service_comes_back(ray_service: RayService, kind: str):
    """After the first the worker's raylet is silent while the model loads again, which is no reason to start over."""
    server = ray_service.server
    expected = ray_service.once(reference, server)
    deaths = server.log.count("the server died")
    fault = replace(FAULTS[kind], repair=pause_raylet_in_load) if kind == PAUSED else FAULTS[kind]
    outcome = inject_fault(ray_service.cluster, server, fault, expected)
    if kind == PAUSED:
        assert server.log.count("the server died") == deaths + 1
    assert outcome.wrong == 0
    assert all(answer.whole or answer.error for answer in outcome.answers)
    assert any(answer.error for answer in outcome.answers)  # it did befall them
    assert outcome.told < TOLD
    assert outcome.recovered < RECOVERED
    assert outcome.stale == {}
