"""The router's file: as Kubernetes starts it, with TLS, and without replicas."""

import ssl
import subprocess
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from certificates import own_certificate
from manifests import container
from routers import CONFIG, HAPROXY, failing, needs_haproxy, running_router
from serving import free_port
from waiting import eventually

pytestmark = needs_haproxy


def chain_and_key(directory: Path) -> Path:
    """A certificate as Kubernetes mounts it for the router: the key in a file beside the chain."""
    chain, key = own_certificate(directory)
    key.rename(f"{chain}.key")
    return chain


def test_the_configuration_is_valid_as_the_deployment_starts_it(tmp_path):
    router = container("router")
    chain = chain_and_key(tmp_path)
    environ = {one["name"]: one["value"] for one in router["env"]} | {"ROUTER_PEM": str(chain)}
    assert router["command"][0] == "haproxy"
    command = [HAPROXY, "-c", *router["command"][1:-1], CONFIG]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr


def test_without_replicas_it_says_which_variable_is_missing():
    done = subprocess.run([HAPROXY, "-c", "-f", CONFIG], env={}, capture_output=True, text=True)
    assert done.returncode != 0 and "REPLICA_1" in done.stderr


def test_without_any_replica_clients_are_told_when_to_come_again():
    with ExitStack() as replica:
        (address,) = replica.enter_context(failing(503))
        with running_router(address) as router:
            replica.close()
            answer = router.ask("-", "Why is sea water salty?")
            assert answer.status_code == 503 and answer.headers["retry-after"] == "10"
            assert answer.json()["error"]["type"] == "ServiceUnavailable"
            eventually(lambda: router.status.get("/readyz").status_code == 503)


def test_it_listens_with_tls(tmp_path):
    chain = chain_and_key(tmp_path)
    port = free_port()
    process = subprocess.Popen(
        [HAPROXY, "-db", "-f", CONFIG], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={"REPLICA_1": "127.0.0.1:9", "ROUTER_PEM": str(chain), "ROUTER_BIND": f"127.0.0.1:{port}",
             "ROUTER_STATUS": f"127.0.0.1:{free_port()}"},
    )  # fmt: skip
    trusted = ssl.create_default_context(cafile=chain)
    try:

        def answers() -> bool:
            try:
                answer = httpx.get(f"https://127.0.0.1:{port}/metrics", verify=trusted, trust_env=False)
                return answer.status_code == 404
            except httpx.TransportError:
                return False

        eventually(answers)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)
    finally:
        process.terminate()
        process.wait(timeout=10)
