"""How Ray is set up on a node: what it is started with, and the variables that it and its programs need."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hunyuan_vllm.cluster.ports import GCS_PORT, ray_flags
from hunyuan_vllm.cluster.ray_token import PATH_VARIABLE
from hunyuan_vllm.cluster.tls import NodeFiles
from hunyuan_vllm.ray_environment import names_a_secret
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.net import INTERFACE_VARIABLES, host_port

RAY_SETTINGS = {
    # A node is dead after five checks in a row without an answer, about 25 s; Ray's own minute is long for clients.
    # With three checks of 2 s a node whose raylet stands still for 10 s is ended, and the model has to be loaded anew:
    # docs/deploy.md.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "5",
    # Ray lets all else on a node run before its workers (nice 15, ray-project/ray#24928); here they are vLLM's ranks.
    "RAY_worker_niceness": "0",
}
OBJECT_STORE = 2**29  # bytes: vLLM's ranks pass tensors to each other without it


@dataclass(frozen=True)
class NodeSetup:
    """One node of a cluster.

    Attributes:
        address: its own.
        head: the head's address, which is the same on the head.
        interface: network interface that carries `address`.
        gpus: how many Ray is told of.
        token_file: where the token is.
        tls: the folder with keys and certificates; None where connections between nodes are not encrypted.
        variables: more environment variables, for Ray and all it starts.
    """

    address: str
    head: str
    interface: str
    gpus: int
    token_file: str
    tls: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_head(self) -> bool:
        return self.address == self.head

    @property
    def gcs(self) -> str:
        """Address and port that nodes and drivers join at."""
        return host_port(self.head, GCS_PORT)

    @property
    def tls_files(self) -> NodeFiles | None:
        return NodeFiles(Path(self.tls), self.address) if self.tls else None

    def environment(self) -> dict[str, str]:
        """The variables for Ray on this node, and for a program on it that joins the cluster as a driver."""
        return {
            "VLLM_HOST_IP": self.address,
            **dict.fromkeys(INTERFACE_VARIABLES, self.interface),
            "RAY_ADDRESS": self.gcs,
            "RAY_AUTH_MODE": "token",
            PATH_VARIABLE: self.token_file,
            "RAY_USAGE_STATS_ENABLED": "0",
            **RAY_SETTINGS,
            **(self.tls_files.variables if self.tls_files else {}),
            **self.variables,
        }

    def ray_arguments(self) -> list[str]:
        """What follows `ray`."""
        role = ["--head", "--include-dashboard=false", "--no-monitor"] if self.is_head else [f"--address={self.gcs}"]
        # Ray starts a worker per CPU in advance; vLLM's ask for GPUs, and one each is plenty.
        sizes = [f"--num-gpus={self.gpus}", f"--num-cpus={max(self.gpus, 1)}", f"--object-store-memory={OBJECT_STORE}"]
        return ["start", *role, f"--node-ip-address={self.address}", *sizes, *ray_flags(self.is_head),
                "--disable-usage-stats"]  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> NodeSetup:
        return cls(**values)


def parse_variables(words: list[str]) -> dict[str, str]:
    """`NAME=VALUE` each.

    Raises:
        UserError: one is something else, is ours to set, or looks like a secret, which Ray would show.
    """
    ours = NodeSetup("", "", "", 0, "", "/").environment()
    variables = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise UserError(f"--env {word}: give NAME=VALUE")
        if names_a_secret(name):
            raise UserError(f"--env {name}: Ray shows its environment to whoever may read its logs; use a file")
        if name in ours:
            raise UserError(f"--env {name}: the cluster sets it itself")
        variables[name] = value
    return variables
