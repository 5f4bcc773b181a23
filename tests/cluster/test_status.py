"""`cluster status`: the state of each host, what is missing, and the record it is read from."""

import pytest
from test_up_decisions import HEAD, OTHER, Cluster

from hunyuan_vllm.cluster import status
from hunyuan_vllm.cluster.hosts import Host
from hunyuan_vllm.cluster.ray_nodes import RayNode


@pytest.fixture
def cluster(monkeypatch):
    made = Cluster()
    for host in made.hosts:
        host.setup = made.setup(host.address)
        made.states[host.address] = made.state(host.setup, 1)
    monkeypatch.setattr(status, "ask_members", lambda setup: (made.members, "" if made.members else "no answer"))
    return made


def read(cluster) -> tuple[list[str], list[str]]:
    """State of each host, and all problems."""
    found = status.read_status(cluster)
    problems = [problem["what"] for node in found["nodes"] for problem in node["problems"]]
    assert found["whole"] is not bool(problems)
    return [node["state"] for node in found["nodes"]], problems


def test_complete(cluster):
    assert read(cluster) == (["running", "running"], [])
    report = status.read_status(cluster)
    assert (report["whole"], report["gpus"], report["gpus_wanted"], report["head"]) == (True, 16, 16, HEAD)


def test_what_is_missing(cluster):
    cluster.members = [RayNode(HEAD, 6, 0)]
    cluster.states[OTHER] = cluster.state()
    states, problems = read(cluster)
    assert states == ["running", "stopped"]
    assert problems == ["Ray has 6 GPUs of it, and should have 8", "no Ray runs there"]


def test_another_ray_and_a_head_that_does_not_answer(cluster):
    cluster.members = []
    cluster.states[OTHER] = cluster.state(raylets=1)
    states, problems = read(cluster)
    assert states == ["running", "other"]
    assert problems == ["the head does not answer: no answer", "another Ray runs there"]


def test_a_host_that_is_not_reached(cluster):
    cluster.usable = cluster.hosts[:1]
    cluster.hosts[1].problem("no answer from it", "start it")
    assert read(cluster) == (["running", "unreached"], ["no answer from it"])


def test_the_record_is_read_back(cluster, tmp_path):
    assert status.recorded_cluster(tmp_path) is None
    hosts = [Host(host.name, 36000, "me", setup=host.setup) for host in cluster.hosts]
    status.record_cluster(hosts, "/venv/bin/python", tmp_path)
    found = status.recorded_cluster(tmp_path)
    assert found is not None and found[1] == "/venv/bin/python"
    assert [(host.name, host.port, host.user, host.setup) for host in found[0]] == [
        (host.name, 36000, "me", host.setup) for host in hosts
    ]
