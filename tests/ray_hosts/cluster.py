"""Hosts `head` and `worker` with Ray on them, and `client`, whose requests come over the network."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

from hosts import Host, Network

from ray_hosts.served import Served

__all__ = ["RAY_PORT", "RayHosts"]

PLUGIN = Path(__file__).parent / "plugin"
BIN = Path(sys.executable).parent
RAY_PORT = 6379
TOKEN_FILE = "/root/.ray/auth_token"
# Of an unknown environment nothing is inherited: what the nodes and the server get is here.
COMMON = {
    "HOME": "/root",
    "USER": "root",
    "LANG": "C.UTF-8",
    "PYTHONPATH": str(PLUGIN),
    "RAY_ON_CPU": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "RAY_AUTH_MODE": "token",
    "RAY_DEDUP_LOGS": "0",  # a line that two workers print is there twice
    # Seconds until a node that is silent counts as dead; by default, a minute.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


class RayHosts:
    """The three hosts; Ray is started by `start`, which gives every node one "GPU"."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.head, self.worker, self.client = (network.add(name) for name in ("head", "worker", "client"))
        self.token = secrets.token_hex(32)

    def environment(self, host: Host) -> dict[str, str]:
        """What an operator exports before Ray is started on a node."""
        path = f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        interfaces = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME"), "eth0")
        return {**COMMON, "PATH": path, "VLLM_HOST_IP": host.address, **interfaces}

    def give_token(self, host: Host) -> None:
        """Where Ray looks for it, readable by its owner alone."""
        host.sh(f"umask 077; mkdir -p /root/.ray; cat >{TOKEN_FILE}", input=self.token)

    def start(self, host: Host, gpus: int = 1) -> None:
        """Start Ray on a host: as the head, or joining it."""
        self.give_token(host)
        role = [f"--address={self.head.address}:{RAY_PORT}"]
        if host is self.head:
            role = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false"]
        host.run(
            BIN / "ray", "start", *role, f"--node-ip-address={host.address}", "--num-cpus=1", f"--num-gpus={gpus}",
            "--object-store-memory=100000000", "--disable-usage-stats",
            env=self.environment(host), timeout=120,
        )  # fmt: skip

    def stop(self, host: Host) -> None:
        """End all of Ray on a host, orphaned workers too."""
        host.run(BIN / "ray", "stop", "--force", env=self.environment(host), timeout=60)

    def serve(self, *flags: str, **environ: str) -> Served:
        """`hunyuan-vllm serve` on the head, tensor-parallel over both nodes; not waited for."""
        command = [str(BIN / "hunyuan-vllm"), "serve", "--distributed-executor-backend", "ray"]
        return Served(
            self.head,
            [*command, "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(2**26), *flags],
            {**self.environment(self.head), "TP_SIZE": "2", "LOCAL_IP": self.head.address, **environ},
            self.client,
        )
