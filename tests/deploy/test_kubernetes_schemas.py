"""The Kubernetes manifests against the schemas of Kubernetes and LeaderWorkerSet."""

import copy
import json
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from manifests import NAMESPACE, files, named, objects

ROOT = Path(__file__).parents[2]
OLDEST, NEWEST = "1.30", "1.37"  # of Kubernetes: lifecycle.preStop.sleep came with the first; what the package knows
SPEC_OF_SETS = json.loads(Path(__file__).with_name("leader_worker_set.json").read_text())


def validate(document: dict, version: str) -> None:
    if document["kind"] != "LeaderWorkerSet":
        kubernetes_validate.validate(document, version, strict=True)
        return
    assert document["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    jsonschema.validate(document["spec"], SPEC_OF_SETS)
    for name in ("leaderTemplate", "workerTemplate"):
        template = document["spec"]["leaderWorkerTemplate"][name]
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": template}
        kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("document", objects(), ids=lambda one: f"{one['kind']}-{one['metadata']['name']}")
def test_the_schema_has_nothing_to_say(document, version):
    validate(document, version)


@pytest.mark.parametrize(
    ("kind", "name", "path", "value"),
    [
        ("LeaderWorkerSet", "hunyuan", "spec.leaderWorkerTemplate.restartPolicy", "Always"),
        ("LeaderWorkerSet", "hunyuan", "spec.leaderWorkerTemplate.workers", 2),
        ("LeaderWorkerSet", "hunyuan", "spec.leaderWorkerTemplate.workerTemplate.spec.securityContexts", {}),
        ("LeaderWorkerSet", "hunyuan", "spec.leaderWorkerTemplate.leaderTemplate.spec.containers", [{"nam": "server"}]),
        ("PodDisruptionBudget", "hunyuan", "spec.minAvailables", 1),
        ("NetworkPolicy", "hunyuan-names-only", "spec.policyTypes", "Ingress"),
        ("Deployment", "hunyuan-router", "spec.template.spec.containers", None),
    ],
)
def test_the_schema_finds_a_slip(kind, name, path, value):
    document = copy.deepcopy(named(kind, name))
    *parents, last = path.split(".")
    place = document
    for parent in parents:
        place = place[parent]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(document, NEWEST)


def test_every_manifest_is_applied():
    present = {file for directory in ("k8s", "router") for file in (ROOT / "deploy" / directory).glob("*.yaml")}
    assert {file for file in present if file.name != "kustomization.yaml"} == set(files())
    assert yaml.safe_load((ROOT / "deploy/k8s/kustomization.yaml").read_text())["namespace"] == NAMESPACE
