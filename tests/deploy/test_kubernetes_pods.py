"""The Kubernetes manifests: whether pods are confined, and fit the image, our code and each other."""

import re
import sys
from pathlib import Path

import pytest
from manifests import NAMESPACE, container, named, templates, variables

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
ROLES = ("leader", "worker", "router")


@pytest.mark.parametrize("role", ROLES)
def test_pods_are_let_into_a_restricted_namespace(role):
    labels = named("Namespace", NAMESPACE)["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    spec = templates()[role]["spec"]
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers", "ephemeralContainers"} & set(spec)
    assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert {kind for one in spec["volumes"] for kind in one if kind != "name"} <= {
        "persistentVolumeClaim", "secret", "configMap", "emptyDir",
    }  # fmt: skip
    assert container(role)["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip


@pytest.mark.parametrize("role", ROLES)
def test_every_container_has_limits(role):
    resources = container(role)["resources"]
    assert {"cpu", "memory", "ephemeral-storage"} <= set(resources["limits"]) & set(resources["requests"])
    if role != "router":
        assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == "8"


@pytest.mark.parametrize("role", ROLES)
def test_only_what_has_a_limit_can_be_written(role):
    volumes = {one["name"]: one for one in templates()[role]["spec"]["volumes"]}
    writable = {}
    for mount in container(role)["volumeMounts"]:
        volume = volumes.pop(mount["name"])
        if "emptyDir" in volume:
            assert volume["emptyDir"]["sizeLimit"]
            writable[mount["mountPath"]] = volume["emptyDir"].get("medium")
        else:
            assert mount["readOnly"] is True
    assert volumes == {}, "mounted nowhere"
    home = re.findall(r"^WORKDIR (\S+)$", DOCKERFILE, re.M)[-1]
    assert writable == ({} if role == "router" else {"/dev/shm": "Memory", home: None, "/tmp": None})


@pytest.mark.parametrize("role", ["leader", "worker"])
def test_pods_fit_the_image(role):
    (user,) = re.findall(r"useradd --uid (\d+)", DOCKERFILE)
    assert re.findall(r"^USER (\S+)$", DOCKERFILE, re.M) == [user]
    security = templates()[role]["spec"]["securityContext"]
    assert {security[name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {int(user)}
    assert [mount["mountPath"] for mount in container(role)["volumeMounts"] if mount["name"] == "model"] == [
        re.search(r"MODEL_PATH=(\S+)", DOCKERFILE)[1]
    ]
    assert container(role)["image"] == "hunyuan-vllm"


# Secrets


@pytest.mark.parametrize("role", ROLES)
def test_no_secret_is_in_the_environment(role):
    one = container(role)
    assert "envFrom" not in one
    for variable in one["env"]:
        assert "secretKeyRef" not in str(variable)
        if re.search(r"KEY|TOKEN|SECRET|PASSWORD|PEM", variable["name"]):
            assert variable["value"].startswith("/run/secrets/"), "a path of a secret, not the secret"


@pytest.mark.parametrize("role", ROLES)
def test_secrets_are_files_for_their_readers_alone(role):
    spec = templates()[role]["spec"]
    secrets = {one["name"]: one["secret"] for one in spec["volumes"] if "secret" in one}
    expected = {
        "leader": {"hunyuan-api-key", "hunyuan-ray-token"},
        "worker": {"hunyuan-ray-token"},
        "router": {"hunyuan-router-tls"},
    }
    assert {secret["secretName"] for secret in secrets.values()} == expected[role]
    assert all(secret["defaultMode"] == 0o440 for secret in secrets.values())
    assert spec["securityContext"]["fsGroup"] == spec["securityContext"]["runAsGroup"]
    directories = [mount["mountPath"] for mount in container(role)["volumeMounts"] if mount["name"] in secrets]
    paths = [value for value in variables(role).values() if value.startswith("/run/secrets/")]
    assert sorted(directories) == sorted(str(Path(path).parent) for path in paths)
    guide = (ROOT / "docs/kubernetes.md").read_text()
    assert all(secret["secretName"] in guide for secret in secrets.values())
