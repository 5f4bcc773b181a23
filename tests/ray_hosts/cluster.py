"""Hosts `head` and `worker` with Ray on them, and `client`, whose requests come over the network."""

import json
import secrets
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hosts import HOME, Host, Network

from hunyuan_vllm.cluster.ray_node import NodeSetup
from ray_hosts.served import Served

PLUGIN = Path(__file__).parent / "plugin"
BIN = Path(sys.executable).parent
TOKEN_FILE = f"{HOME}/.ray/auth_token"
# What an operator's shell has. Nothing is inherited from the tests.
SHELL = {
    "HOME": HOME,
    "USER": "root",
    "LANG": "C.UTF-8",
    "PATH": f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}
ON_CPUS = {
    "PYTHONPATH": str(PLUGIN),
    "RAY_ON_CPU": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "RAY_DEDUP_LOGS": "0",  # a line that two workers print is there twice
}
TESTS = PLUGIN.parents[1]
FASTER = {
    "PYTHONPATH": ":".join(str(path) for path in (PLUGIN, TESTS / "fast_imports", TESTS / "forked_engines")),
    "FORKED_ENGINES": "fork",  # of servers
    "TORCH_COMPILE_DISABLE": "1",
}


class RayHosts:
    """The three hosts. Ray is started and stopped as `hunyuan-vllm cluster` does it, with one "GPU" a node.

    Args:
        faster: servers start faster than a user's, which a benchmark would measure.
    """

    def __init__(self, network: Network, faster: bool = False) -> None:
        self.network = network
        self.variables = ON_CPUS | FASTER if faster else ON_CPUS
        self.head, self.worker, self.client = (network.add(name) for name in ("head", "worker", "client"))
        self.token = secrets.token_hex(32)

    def setup(self, host: Host) -> NodeSetup:
        return NodeSetup(host.address, self.head.address, "eth0", 1, TOKEN_FILE, variables=self.variables)

    def environment(self, host: Host) -> dict[str, str]:
        """For a program on a host that joins the cluster; the token is in a file of the two nodes."""
        return SHELL | self.setup(host).environment()

    def start(self, host: Host) -> None:
        """Start Ray on a host: as the head, or joining it."""
        self._on_node(host, {"do": "start", "setup": asdict(self.setup(host)), "token": self.token})

    def stop(self, host: Host) -> None:
        """End all of Ray on a host, including stale workers."""
        self._on_node(host, {"do": "stop"})

    def _on_node(self, host: Host, asked: dict[str, Any]) -> None:
        module = "hunyuan_vllm.cluster.ray_start"
        done = host.run(sys.executable, "-m", module, input=json.dumps(asked), env=SHELL, timeout=180)
        answer = json.loads(done.stdout)
        if "problem" in answer or answer.get("stuck"):
            raise AssertionError(f"{host.name}: {answer}")

    def serve(self, *flags: str, **environ: str) -> Served:
        """`hunyuan-vllm serve` on the head, tensor-parallel over both nodes; not waited for."""
        command = [str(BIN / "hunyuan-vllm"), "serve", "--distributed-executor-backend", "ray"]
        return Served(
            self.head,
            [*command, "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(2**26), *flags],
            {**SHELL, **self.variables, "TP_SIZE": "2", "LOCAL_IP": self.head.address, **environ},
            self.client,
        )
