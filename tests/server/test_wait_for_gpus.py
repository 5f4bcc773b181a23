"""Waiting for the GPUs of a Ray cluster: what is said meanwhile, and when it ends."""

import io
from contextlib import redirect_stderr
from dataclasses import dataclass

import pytest

from hunyuan_vllm.cluster.ray_nodes import RayNode
from hunyuan_vllm.server import ray_cluster
from hunyuan_vllm.server.ray_cluster import RayCluster, describe_nodes, wait_for_gpus
from hunyuan_vllm.util.errors import NotYetError, UserError

HEAD, WORKER = RayNode("10.0.0.1", 8, 8), RayNode("10.0.0.2", 8, 8)
BUSY, GONE = RayNode("10.0.0.2", 8, 2), RayNode("10.0.0.2", 8, 0, alive=False)
WHOLE = RayCluster([HEAD, WORKER])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ray_cluster, "POLL_PERIOD", 0.01)


def looks(*clusters):
    """A cluster that changes from look to look; an exception is raised."""
    left = list(clusters)

    def find(environ):
        now = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(now, Exception):
            raise now
        return now

    return find


def waited(*clusters, needed=16, limit=20.0, expected=()) -> str:
    with redirect_stderr(io.StringIO()) as errors:
        wait_for_gpus(needed, {}, limit, expected, find=looks(*clusters))
    return errors.getvalue()


def test_nothing_is_said_where_all_is_there():
    assert waited(WHOLE) == ""


def test_each_change_is_said_once():
    alone = RayCluster([HEAD])
    said = waited(None, alone, alone, alone, RayCluster([HEAD, BUSY]), WHOLE)
    assert said.count("hunyuan-vllm: waiting for GPUs in Ray: ") == 3
    assert "0 of 16 are free\n  no Ray cluster is running here: start it on this node (sh deploy/ray_head.sh)" in said
    assert "8 of 16 are free\n  10.0.0.1 has 8 of its 8 GPUs free\n  nodes with 8 more GPUs have not joined" in said
    assert "10 of 16 are free\n" in said and "10.0.0.2 has 2 of its 8 GPUs free: another Ray program uses" in said
    assert "  giving up in 0:19\n" in said
    assert said.endswith("hunyuan-vllm: all 16 GPUs are free\n")


def test_missing_nodes_are_named():
    assert describe_nodes(RayCluster([HEAD, GONE]), ["10.0.0.1", "10.0.0.2", "10.0.0.3"]) == [
        "10.0.0.1 has 8 of its 8 GPUs free",
        "10.0.0.2 has left: restart Ray there (sh deploy/ray_worker.sh HEAD_IP)",
        "10.0.0.3 has not joined: run sh deploy/ray_worker.sh HEAD_IP there",
    ]
    assert describe_nodes(RayCluster([HEAD, GONE, WORKER]))[1:] == ["10.0.0.2 has 8 of its 8 GPUs free"]


def test_the_end_says_what_was_missing():
    with pytest.raises(NotYetError) as raised:
        waited(RayCluster([HEAD, GONE]), limit=0.05)
    message = str(raised.value)
    assert message.startswith("16 GPUs are needed and 8 are free in Ray after 0.05 s: 10.0.0.1 has 8 of its 8 GPUs")
    assert "10.0.0.2 has left" in message and "Set TP_SIZE for fewer, or GPU_WAIT for longer" in message
    assert "\n" not in message


def test_a_cluster_that_refuses_is_asked_again():
    said = waited(UserError("no Ray cluster answers at 10.0.0.1:6379 (token is missing): start it"), WHOLE)
    assert "no Ray cluster answers at 10.0.0.1:6379 (token is missing)" in said


@dataclass
class Stop:
    requested: bool = True


def test_an_operator_need_not_wait():
    wait_for_gpus(16, {}, 20, stop=Stop(), find=looks(RayCluster([HEAD])))


def test_a_supervisor_waits_without_a_limit():
    missing = UserError("no Ray cluster answers at 10.0.0.1:6379")
    said = waited(missing, None, RayCluster([HEAD]), WHOLE, limit=None, expected=["10.0.0.2"])
    assert "no Ray cluster answers" in said and "10.0.0.2 has not joined" in said
    assert "giving up" not in said
