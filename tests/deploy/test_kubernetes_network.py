"""The Kubernetes manifests: who reaches whom, by the rules of NetworkPolicy, and what may be taken away at once."""

import pytest
from manifests import LWS, Pod, allowed, named, pods, replica_pods, selects, templates

from hunyuan_vllm.cluster.ray_node import checked_ports
from hunyuan_vllm.envs import DEFAULT_PORT

RAY_AND_VLLM = [*checked_ports(), 23456, 61000]  # vLLM takes what the system gives it
ROUTER = pods(templates()["router"])
DNS = Pod({"k8s-app": "kube-dns"}, namespace="kube-system")
STRANGERS = {
    "a pod beside": Pod({"app": "x"}),
    "a pod elsewhere": Pod(namespace="default"),
    "one that calls itself a leader": Pod(
        {f"{LWS}/name": "hunyuan", f"{LWS}/group-index": "0", "app.kubernetes.io/component": "leader"},
        namespace="default",
    ),
}
CLIENT = Pod(namespace="apps", namespace_labels={"hunyuan-clients": "allowed"})
PROMETHEUS = Pod(namespace="monitoring", namespace_labels={"hunyuan-metrics": "allowed"})


def test_pods_of_a_replica_reach_each_other_and_no_other_replica():
    everyone = replica_pods()
    for (group, index), source in everyone.items():
        for (other_group, other_index), target in everyone.items():
            for port in [*RAY_AND_VLLM, DEFAULT_PORT]:
                if (group, index) != (other_group, other_index):
                    assert allowed(source, target, port) is (group == other_group), (group, other_group, port)


@pytest.mark.parametrize("stranger", [*STRANGERS.values(), CLIENT, PROMETHEUS, DNS], ids=[*STRANGERS, "c", "p", "d"])
def test_nobody_else_reaches_a_replica(stranger):
    for target in replica_pods().values():
        assert not any(allowed(stranger, target, port) for port in [*RAY_AND_VLLM, DEFAULT_PORT])


def test_the_router_reaches_the_leaders_port_alone():
    for (_, index), target in replica_pods().items():
        assert allowed(ROUTER, target, DEFAULT_PORT) is (index == 0)
        assert not any(allowed(ROUTER, target, port) for port in RAY_AND_VLLM)


def test_clients_and_prometheus_reach_the_router():
    for stranger in STRANGERS.values():
        assert not any(allowed(stranger, ROUTER, port) for port in ROUTER.ports.values())
    assert allowed(CLIENT, ROUTER, ROUTER.ports["https"]) and not allowed(CLIENT, ROUTER, ROUTER.ports["status"])
    assert allowed(PROMETHEUS, ROUTER, ROUTER.ports["status"])
    assert not allowed(PROMETHEUS, ROUTER, ROUTER.ports["https"])


def test_pods_look_up_names_and_go_nowhere_else():
    for source in [*replica_pods().values(), ROUTER]:
        assert allowed(source, DNS, 53, "UDP") and allowed(source, DNS, 53)
        assert not allowed(source, DNS, 443)
        assert not any(allowed(source, stranger, 443) for stranger in STRANGERS.values())


def test_one_replica_at_a_time_may_be_taken():
    spec = named("PodDisruptionBudget", "hunyuan")["spec"]
    everyone = replica_pods()
    assert all(selects(spec["selector"], pod.labels) for pod in everyone.values())
    assert not selects(spec["selector"], pods(templates()["router"]).labels)
    assert spec["minAvailable"] == len(everyone) - 1
    update = named("LeaderWorkerSet", "hunyuan")["spec"]["rolloutStrategy"]["rollingUpdateConfiguration"]
    assert update == {"maxUnavailable": 1, "maxSurge": 0}


def test_a_router_is_always_there():
    spec = named("PodDisruptionBudget", "hunyuan-router")["spec"]
    assert selects(spec["selector"], pods(templates()["router"]).labels)
    assert 0 < spec["minAvailable"] < named("Deployment", "hunyuan-router")["spec"]["replicas"]
