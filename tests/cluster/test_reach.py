"""Addresses of Ray clusters where nothing listens, and what is told of them without waiting for Ray's client."""

import socket

import pytest

from hunyuan_vllm.cluster import ray_nodes
from hunyuan_vllm.cluster.ray_node import NodeSetup
from hunyuan_vllm.util.net import why_unreachable


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_listener_is_reached(host, scheme):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        port = listener.getsockname()[1]
        address = f"{scheme}[{host}]:{port}" if ":" in host else f"{scheme}{host}:{port}"
        assert why_unreachable(address) == ""
    assert why_unreachable(address) == "Connection refused"


def test_one_that_takes_no_connection():
    with socket.socket() as bound:  # and does not listen: its queue is full from the first
        bound.bind(("127.0.0.1", 0))
        bound.listen(0)
        address = "{}:{}".format(*bound.getsockname())
        with socket.create_connection(bound.getsockname()):
            assert why_unreachable(address, 0.2) == "no answer"


@pytest.mark.parametrize("address", ["", "auto", "host", "host:port", "host:0", "host:70000"])
def test_what_is_no_address(address):
    with pytest.raises(ValueError):
        why_unreachable(address)


def test_the_members_of_a_cluster_that_does_not_run(monkeypatch):
    monkeypatch.setattr(ray_nodes, "query_nodes", lambda *_, **__: pytest.fail("Ray was asked, which takes 40 s"))
    head = NodeSetup("127.0.0.2", "127.0.0.2", "lo", 1, "token")
    found, why = ray_nodes.ask_members(head)
    assert found == [] and why == f"nothing answers at {head.gcs} (Connection refused)"
