"""How Ray is set up on a node: ports, flags of `ray start`, the token, and the variables of Ray and its programs"""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hunyuan_vllm.cluster.tls import NodeFiles
from hunyuan_vllm.ray_environment import names_a_secret
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.files import make_private, read_private
from hunyuan_vllm.util.net import INTERFACE_VARIABLES, host_port


@dataclass(frozen=True)
class Port:
    """One port, or a range of them.

    Attributes:
        first, last: the same number for a single port.
        flag: of `ray start`; for a range the flags of its ends, with a comma between.
        extra: whether it is open only where the extra `ray[default]` is installed, which nothing here needs.
    """

    name: str
    first: int
    last: int
    flag: str
    head_only: bool = False
    extra: bool = False

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


GCS_PORT = 6379
# Below the ports that Linux gives to outgoing connections (32768 and up), so that none is taken by chance.
# What each is for and how it is protected: docs/security.md.
PORTS = (
    Port("GCS", GCS_PORT, GCS_PORT, "--port", head_only=True),
    Port("node manager", 6380, 6380, "--node-manager-port"),
    Port("object manager", 6381, 6381, "--object-manager-port"),
    Port("runtime env agent", 6382, 6382, "--runtime-env-agent-port"),
    Port("dashboard agent", 6383, 6383, "--dashboard-agent-grpc-port", extra=True),
    Port("dashboard agent HTTP", 6384, 6384, "--dashboard-agent-listen-port", extra=True),
    Port("metrics", 6385, 6385, "--metrics-export-port", extra=True),
    Port("workers", 6400, 6655, "--min-worker-port,--max-worker-port"),
)
WORKER_PORTS = range(PORTS[-1].first, PORTS[-1].last + 1)


def fixed_ports(head: bool) -> dict[int, Port]:
    """The single ports of a node, which must be free before Ray starts there."""
    return {port.first: port for port in PORTS if port.first == port.last and (head or not port.head_only)}


def checked_ports() -> list[int]:
    """Those that `cluster check` tries: the single ones, and the ends of the range."""
    return [*fixed_ports(head=True), WORKER_PORTS[0], WORKER_PORTS[-1]]


RAY_SETTINGS = {
    # A node is dead after five checks in a row without an answer, about 25 s; Ray's own minute is long for clients.
    # With three checks of 2 s a node whose raylet pauses for 10 s is ended, and the model has to be loaded again:
    # docs/deploy.md.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "5",
    # Ray gives its workers a low priority (nice 15, ray-project/ray#24928); here they are vLLM's ranks.
    "RAY_worker_niceness": "0",
}
OBJECT_STORE = 2**29  # bytes: vLLM's ranks pass tensors to each other without it
TOKEN_VARIABLE = "RAY_AUTH_TOKEN_PATH"
HOOK = f"{__name__}.leave_client_server_out"  # RAY_START_HOOK


@dataclass(frozen=True)
class NodeSetup:
    """One node of a cluster.

    Attributes:
        head: the head's address, which is the same on the head.
        tls: the directory with keys and certificates; None where connections between nodes are not encrypted.
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
        """Address and port at which nodes and drivers join."""
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
            TOKEN_VARIABLE: self.token_file,
            "RAY_USAGE_STATS_ENABLED": "0",
            **RAY_SETTINGS,
            **(self.tls_files.variables if self.tls_files else {}),
            **self.variables,
        }

    def ray_arguments(self) -> list[str]:
        role = ["--head", "--include-dashboard=false", "--no-monitor"] if self.is_head else [f"--address={self.gcs}"]
        # Ray starts a worker per CPU in advance; vLLM's ask for GPUs, and one CPU each is enough.
        sizes = [f"--num-gpus={self.gpus}", f"--num-cpus={max(self.gpus, 1)}", f"--object-store-memory={OBJECT_STORE}"]
        ports = [
            f"{flag}={number}"
            for port in PORTS
            if self.is_head or not port.head_only
            for flag, number in zip(port.flag.split(","), (port.first, port.last), strict=False)
        ]
        return ["start", *role, f"--node-ip-address={self.address}", *sizes, *ports, "--disable-usage-stats"]


def leave_client_server_out(parameters: Any, head: bool) -> None:
    """Disable the server for Ray's remote clients, which no flag of `ray start` does and nothing here uses.

    `ray start` calls it with its RayParams before it starts anything.
    """
    parameters.ray_client_server_port = None


def token_file(environ: Mapping[str, str], home: Path) -> Path:
    """Where Ray looks for the token, which allows anyone to join and to run anything in the cluster."""
    named = environ.get(TOKEN_VARIABLE, "").strip()
    return Path(named).expanduser().absolute() if named else home / ".ray" / "auth_token"


def read_token(file: Path) -> str | None:
    text = read_private(file)
    if text is None:
        return None
    token = text.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"{file} holds no token: delete it, and the next start creates one")
    return token


def make_token(file: Path) -> str:
    """The token in `file`, made if there is none."""
    make_private(file, secrets.token_hex(32))
    token = read_token(file)
    assert token is not None
    return token


def parse_variables(words: list[str]) -> dict[str, str]:
    ours = NodeSetup("", "", "", 0, "", "/").environment()
    variables = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise UserError(f"--env {word}: give NAME=VALUE")
        if names_a_secret(name):
            raise UserError(f"--env {name}: Ray's logs show its environment; use a file")
        if name in ours:
            raise UserError(f"--env {name}: the cluster sets it itself")
        variables[name] = value
    return variables
