"""What `kubectl apply -k deploy/k8s` would apply, as tests need it: objects, their pods, and who may reach whom."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
NAMESPACE = "hunyuan"
LWS = "leaderworkerset.sigs.k8s.io"
ADDRESS = "10.0.0.5"  # of a pod
Object = dict[str, Any]


def files(directory: Path = ROOT / "deploy/k8s") -> Iterator[Path]:
    """The files that a kustomization names, those of the kustomizations in it among them."""
    for name in yaml.safe_load((directory / "kustomization.yaml").read_text())["resources"]:
        path = (directory / name).resolve()
        if path.is_dir():
            yield from files(path)
        else:
            yield path


@functools.cache
def objects() -> list[Object]:
    return [document for file in files() for document in yaml.safe_load_all(file.read_text())]


def named(kind: str, name: str) -> Object:
    (found,) = [one for one in objects() if one["kind"] == kind and one["metadata"]["name"] == name]
    return found


def templates() -> dict[str, Object]:
    """The pods that are described: "leader", "worker" and "router"."""
    template = named("LeaderWorkerSet", "hunyuan")["spec"]["leaderWorkerTemplate"]
    router = named("Deployment", "hunyuan-router")["spec"]["template"]
    return {"leader": template["leaderTemplate"], "worker": template["workerTemplate"], "router": router}


def container(role: str) -> Object:
    """The only container of the pod described for "leader", "worker" or "router"."""
    (only,) = templates()[role]["spec"]["containers"]
    return only


def variables(role: str) -> dict[str, str]:
    """The environment as the pod gets it."""
    return {one["name"]: one.get("value", ADDRESS).replace("$(LOCAL_IP)", ADDRESS) for one in container(role)["env"]}


@dataclass(frozen=True)
class Pod:
    """A pod as a network policy sees it."""

    labels: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, int] = field(default_factory=dict)
    namespace: str = NAMESPACE
    namespace_labels: Mapping[str, str] = field(default_factory=dict)


def pods(template: Object, **labels: str) -> Pod:
    """A pod made from a template, with labels that its controller adds."""
    ports = {
        port["name"]: port["containerPort"] for one in template["spec"]["containers"] for port in one.get("ports", ())
    }
    return Pod({**template["metadata"]["labels"], **labels}, ports)


def replica_pods() -> dict[tuple[int, int], Pod]:
    """(group, index in it) → the pod, with the labels that LeaderWorkerSet's controller gives it."""
    spec = named("LeaderWorkerSet", "hunyuan")["spec"]
    made = {}
    for group in range(spec["replicas"]):
        for worker in range(spec["leaderWorkerTemplate"]["size"]):
            labels = {f"{LWS}/name": "hunyuan", f"{LWS}/group-index": str(group), f"{LWS}/worker-index": str(worker)}
            made[group, worker] = pods(templates()["worker" if worker else "leader"], **labels)
    return made


def selects(selector: Object | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector matches; an empty one matches everything."""
    selector = selector or {}
    assert set(selector) <= {"matchLabels"}, "the tests read no other kind of selector"
    return all(labels.get(name) == value for name, value in selector.get("matchLabels", {}).items())


def allowed(source: Pod, target: Pod, port: int, protocol: str = "TCP") -> bool:
    """Whether the network policies let `source` connect to `target`: both its egress and the other's ingress."""
    return _open(source, target, target, port, protocol, "Egress") and _open(
        target, source, target, port, protocol, "Ingress"
    )


def _open(pod: Pod, other: Pod, target: Pod, port: int, protocol: str, direction: str) -> bool:
    if pod.namespace != NAMESPACE:
        return True  # has policies of its own, or none
    policies = [
        one["spec"]
        for one in objects()
        if one["kind"] == "NetworkPolicy"
        and direction in one["spec"]["policyTypes"]
        and selects(one["spec"]["podSelector"], pod.labels)
    ]
    rules = [rule for policy in policies for rule in policy.get(direction.lower(), ())]
    peers = "from" if direction == "Ingress" else "to"
    return not policies or any(
        any(_is(peer, other) for peer in rule[peers]) and _has(rule.get("ports"), target, port, protocol)
        for rule in rules
    )


def _is(peer: Object, pod: Pod) -> bool:
    assert set(peer) <= {"podSelector", "namespaceSelector"}
    if "namespaceSelector" in peer:
        own = {"kubernetes.io/metadata.name": pod.namespace}
        here = selects(peer["namespaceSelector"], {**own, **pod.namespace_labels})
    else:
        here = pod.namespace == NAMESPACE
    return here and selects(peer.get("podSelector"), pod.labels)


def _has(ports: list[Object] | None, target: Pod, port: int, protocol: str) -> bool:
    if ports is None:
        return True
    return any(
        entry["protocol"] == protocol and target.ports.get(str(entry["port"]), entry["port"]) == port for entry in ports
    )
