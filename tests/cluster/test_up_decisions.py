"""What `cluster up` starts, ends and leaves alone, with hosts and Ray that are stand-ins."""

from dataclasses import asdict
from pathlib import Path

import pytest

from hunyuan_vllm.cluster import up
from hunyuan_vllm.cluster.hosts import Host
from hunyuan_vllm.cluster.ray_node import NodeSetup
from hunyuan_vllm.cluster.ray_nodes import RayNode
from hunyuan_vllm.cluster.ray_start import RayState
from hunyuan_vllm.cluster.up import Up
from hunyuan_vllm.util.findings import Section

HEAD, OTHER = "10.0.0.1", "10.0.0.2"


class Cluster:
    """Two hosts; records what is done to them. `states` is what runs on each, `members` what the head counts."""

    def __init__(self) -> None:
        self.hosts = [Host(address, address=address) for address in (HEAD, OTHER)]
        self.usable = self.hosts
        self.states = {address: self.state() for address in (HEAD, OTHER)}
        self.members = [RayNode(address, 8, 8) for address in (HEAD, OTHER)]
        self.done: list[tuple[str, str]] = []
        self.warnings = 0

    @staticmethod
    def state(setup: NodeSetup | None = None, raylets: int = 0, workloads: list[str] | None = None) -> RayState:
        processes = ["raylet (pid 7)"] * raylets
        return RayState("/home/me", {"eth0": (HEAD, OTHER)}, 8, setup, processes, raylets, workloads or [])

    def each(self, title, hosts, action):
        for host in hosts:
            host.attempt(action)

    def ask_ray(self, host, request, timeout=0.0):
        if request["do"] == "state":
            return asdict(self.states[host.address])
        self.done.append((request["do"], host.address))
        return {"seconds": 1.0, "ended": ["raylet (pid 7)"], "stuck": [], "on_gpus": []}

    def setup(self, address: str) -> NodeSetup:
        return NodeSetup(address, HEAD, "eth0", 8, "/home/me/.ray/auth_token")

    def up(self, **options) -> Up:
        run = Up(self, Path("/home/me"), **options)
        run.run()
        return run


@pytest.fixture
def cluster(monkeypatch):
    made = Cluster()
    section = Section("Hosts")

    class Check:
        def __init__(self, *_):
            pass

        def run(self):
            for _ in range(made.warnings):
                section.warning("clocks", "one is ahead", "set it")
            return [section]

    monkeypatch.setattr(up, "ClusterCheck", Check)
    monkeypatch.setattr(up, "ask_members", lambda setup: (made.members, "" if made.members else "no answer"))
    monkeypatch.setattr(up, "own_addresses", lambda: {HEAD})
    monkeypatch.setattr(up, "find_ray", lambda: None)
    monkeypatch.setattr(up, "make_token", lambda file: "token")
    monkeypatch.setattr(up, "JOIN_TIMEOUT", 0.0)
    return made


def problems(run: Up) -> str:
    return "\n".join(one.text for section in run.sections for one in section.findings if one.status == "problem")


def test_the_head_starts_first_and_every_setup_is_known(cluster):
    run = cluster.up()
    assert run.ok and run.changed and cluster.done == [("start", HEAD), ("start", OTHER)]
    assert [host.setup for host in cluster.hosts] == [cluster.setup(HEAD), cluster.setup(OTHER)]
    assert run.sections[-1].findings[-1].text == "2 nodes with 16 GPUs; programs on the head join it"


def test_what_runs_as_requested_is_left_alone(cluster):
    cluster.states = {address: cluster.state(cluster.setup(address), 1) for address in (HEAD, OTHER)}
    run = cluster.up()
    assert run.ok and not run.changed and cluster.done == []


def test_a_node_that_the_head_does_not_count_is_restarted(cluster):
    cluster.states = {address: cluster.state(cluster.setup(address), 1) for address in (HEAD, OTHER)}
    cluster.members = [RayNode(HEAD, 8, 8)]
    run = cluster.up()
    assert cluster.done == [("stop", OTHER), ("start", OTHER)]
    assert not run.ok and "nodes or GPUs are missing" in problems(run)  # the stand-in's head never counts it


@pytest.mark.parametrize("force", [False, True])
def test_another_ray_in_use_is_ended_by_force_only(cluster, force):
    cluster.states[OTHER] = cluster.state(raylets=1, workloads=["ray::Worker.run"])
    run = cluster.up(force=force)
    if force:
        assert run.ok and ("stop", OTHER) in cluster.done
    else:
        assert cluster.done == [] and not run.changed and "used by ray::Worker.run" in problems(run)


def test_warnings_do_not_stop_it(cluster):
    cluster.warnings = 1
    run = cluster.up()
    assert run.ok and cluster.done


def test_a_host_with_a_problem_stops_it_before_anything_is_done(cluster):
    cluster.hosts[1].problem("no answer", "start it")
    run = cluster.up()
    assert not run.ok and not run.changed and cluster.done == [] and cluster.hosts[1].setup is None
