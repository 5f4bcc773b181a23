"""What the tests of serving over Ray share: the cluster, its server, and strangers who try to get in."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hosts import Host, Network
from ray_hosts import RayHosts, Served
from ray_hosts.cluster import BIN

FIND_SECRETS = Path(__file__).parents[1] / "ray_hosts" / "find_secrets.py"
# What an operator may have exported for other programs: no business of a worker.
CANARIES = {"AWS_SECRET_ACCESS_KEY": "canary-of-the-cloud", "DATABASE_URL": "postgres://me:canary-of-a-url@db/x"}
NODES = "*[node['NodeManagerAddress'] for node in ray.nodes() if node['Alive']]"
DRIVER = "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR'); print('LET IN', ray.nodes())"


class RayService:
    """Hosts head and worker with Ray on both and a server over both; host client asks."""

    def __init__(self, network: Network) -> None:
        self.cluster = RayHosts(network, faster=True)
        self.server: Served | None = None
        self.strangers: dict[str, subprocess.Popen[str]] = {}
        self._found: dict[Callable[[Served], Any], Any] = {}

    def bring_up(self) -> Served:
        """Make whole what is not: Ray on both hosts, the server ready."""
        if self.server is None or self.server.process.poll() is not None:
            if self.server is not None or not self.strangers:
                self.bring_up_nodes()
            # Faults follow one another in the tests; the waits between its lives are to stay those of a first.
            self.server = self.cluster.serve("--supervise", "--max-restart-wait", "1", **CANARIES)
        self.server.wait_until_ready()
        return self.server

    def bring_up_nodes(self) -> None:
        """Ray on both hosts, started anew where a server has ended; strangers try to get in meanwhile."""
        if self.server is not None:
            for host in (self.cluster.head, self.cluster.worker):
                self.cluster.stop(host)
        self.cluster.start(self.cluster.head)
        if not self.strangers:
            self._let_strangers_try()
        self.cluster.start(self.cluster.worker)

    def once(self, find: Callable[[Served], Any], server: Served) -> Any:
        """What `find` found the first time."""
        if find not in self._found:
            self._found[find] = find(server)
        return self._found[find]

    def _let_strangers_try(self) -> None:
        """From the client's host: a node and a driver without the token, and a driver with another token."""
        cluster = self.cluster
        head = cluster.setup(cluster.head).gcs
        join = [BIN / "ray", "start", f"--address={head}", f"--node-ip-address={cluster.client.address}"]
        driver = [sys.executable, "-c", DRIVER]
        environ = cluster.environment(cluster.client)
        open_environ = {**environ, "RAY_AUTH_MODE": "disabled"}
        attempts = {
            "node without the token": ([*join, "--num-gpus=1"], open_environ),
            "driver without the token": ([*driver, head], open_environ),
            "driver with another token": ([*driver, head], {**environ, "RAY_AUTH_TOKEN": "0" * 64}),
        }
        for name, (argv, variables) in attempts.items():
            self.strangers[name] = cluster.client.start(
                *argv, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )

    def what_strangers_got(self) -> dict[str, str]:
        """Each one's output, to its end."""
        return {name: process.communicate(timeout=120)[0] for name, process in self.strangers.items()}

    def nodes(self) -> list[str]:
        """Addresses of the nodes that Ray has."""
        script = f"import ray; ray.init(address='auto', logging_level='ERROR'); print('NODES', {NODES})"
        head = self.cluster.head
        done = head.run(sys.executable, "-c", script, env=self.cluster.environment(head))
        return sorted(next(line for line in done.stdout.splitlines() if line.startswith("NODES")).split()[1:])

    def find_secrets(self, host: Host, secrets: Mapping[str, str]) -> dict[str, Any]:
        """Where on a host they can be read, and which processes of Ray and vLLM were looked at."""
        done = host.run(sys.executable, FIND_SECRETS, input=json.dumps(dict(secrets)))
        report: dict[str, Any] = json.loads(done.stdout)
        return report
