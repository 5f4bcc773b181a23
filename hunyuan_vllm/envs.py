"""The environment variables that the package reads: those of one purpose each, and the server's settings"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.net import LOOPBACK, is_address

CHECKPOINT_CHAT_TEMPLATE = "HUNYUAN_VLLM_CHECKPOINT_CHAT_TEMPLATE"
READY_TIMEOUT = "HUNYUAN_VLLM_READY_TIMEOUT"
DRAIN_GRACE = "HUNYUAN_VLLM_DRAIN_GRACE"
LIMIT_RAY_VARIABLES = "HUNYUAN_VLLM_LIMIT_RAY_VARIABLES"
FORK_ENGINE = "HUNYUAN_VLLM_FORK_ENGINE"
UNUSED_PACKAGES = "HUNYUAN_VLLM_UNUSED_PACKAGES"
PROMPT_CLOCK = "HUNYUAN_VLLM_PROMPT_CLOCK"
SUPERVISOR_RESTARTS = "HUNYUAN_VLLM_SUPERVISOR_RESTARTS"
KEY_FILE_VARIABLE = "HUNYUAN_VLLM_API_KEY_FILE"
# OpenMP's threads (libgomp) check that often whether the others are done, some microseconds, and then sleep. By default
# they check for milliseconds, on cores that other programs, the API server or the other threads wait for.
OPENMP_WAIT = {"GOMP_SPINCOUNT": "1000"}
DEFAULT_PORT = 8020
DEFAULT_GPU_WAIT = 600  # seconds

_TRUE = {"1", "true", "on", "yes"}
_FALSE = {"0", "false", "off", "no"}


def _flag(name: str, default: bool) -> bool:
    raw = os.environ.get(name)
    if raw is None or not raw.strip():
        return default
    value = raw.strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ValueError(f"{name}={raw!r} is not a switch: use 1 (on) or 0 (off)")


def _seconds(name: str, default: float) -> float:
    raw = os.environ.get(name, "").strip()
    try:
        value = float(raw or default)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UserError(f"{name}={raw} is not a number of seconds")
    return value


def cla_sharing() -> bool:
    """HUNYUAN_VLLM_CLA_SHARING (default 1): 0 gives each cross layer a KV cache of its own, for comparison only."""
    return _flag("HUNYUAN_VLLM_CLA_SHARING", default=True)


def native_kernels() -> bool:
    """HUNYUAN_VLLM_NATIVE_KERNELS (default 1): 0 leaves CPU linear layers, experts and routing to torch and vLLM."""
    return _flag("HUNYUAN_VLLM_NATIVE_KERNELS", default=True)


def checkpoint_chat_template() -> bool:
    """HUNYUAN_VLLM_CHECKPOINT_CHAT_TEMPLATE (default 0): 1 uses a checkpoint's template though it is known to be
    wrong."""
    return _flag(CHECKPOINT_CHAT_TEMPLATE, default=False)


def limit_ray_variables() -> bool:
    """HUNYUAN_VLLM_LIMIT_RAY_VARIABLES (default 0; `serve` and `batch` set 1): vLLM copies only those variables of this
    process to its Ray workers that steer them."""
    return _flag(LIMIT_RAY_VARIABLES, default=False)


def fork_engine() -> bool:
    """HUNYUAN_VLLM_FORK_ENGINE (default 0; `serve` sets 1 for one rank on a CPU): the server forks its engine."""
    return _flag(FORK_ENGINE, default=False)


def unused_packages() -> list[str]:
    """HUNYUAN_VLLM_UNUSED_PACKAGES (set by `serve`): packages that vLLM shall not import while the server starts."""
    return os.environ.get(UNUSED_PACKAGES, "").split()


def cache_directory() -> Path:
    """Our directory in vLLM's cache: below VLLM_CACHE_ROOT, else XDG_CACHE_HOME/vllm, else ~/.cache/vllm."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VLLM_CACHE_ROOT") or Path(caches) / "vllm").expanduser() / "hunyuan-vllm"


def ready_timeout() -> float:
    """HUNYUAN_VLLM_READY_TIMEOUT (default 10): seconds in which /readyz must see a token."""
    return _seconds(READY_TIMEOUT, default=10.0)


def drain_grace() -> float:
    """HUNYUAN_VLLM_DRAIN_GRACE (default 60): seconds that requests may go on after SIGTERM; `serve --grace` sets it."""
    return _seconds(DRAIN_GRACE, default=60.0)


def prompt_clock() -> float:
    """HUNYUAN_VLLM_PROMPT_CLOCK (default 60): seconds for which the time that chat templates write stands still, so
    that prompts begin alike and are found in the prefix cache; 0 lets it run."""
    return _seconds(PROMPT_CLOCK, default=60.0)


def supervisor_restarts() -> int | None:
    """HUNYUAN_VLLM_SUPERVISOR_RESTARTS: how often the supervisor has restarted the server; None without supervisor."""
    raw = os.environ.get(SUPERVISOR_RESTARTS)
    return int(raw) if raw else None


def take_ssh_password() -> str | None:
    """HUNYUAN_SSH_PASSWORD, taken out of the environment so that no program started later inherits it."""
    return os.environ.pop("HUNYUAN_SSH_PASSWORD", None) or None


@dataclass(frozen=True)
class Settings:
    """What the variables say of what is served, where and on what.

    Attributes:
        model: MODEL_PATH, a checkpoint directory or a hub name; None serves the demo model.
        local_ip: LOCAL_IP, this node's address among the nodes; also what the server listens on unless HOST is set.
        host: HOST, the address to listen on.
        port: PORT.
        tp_size: TP_SIZE, tensor-parallel ranks; None means all GPUs.
        socket_ifname: SOCKET_IFNAME, the network interface between nodes.
        node_ips: NODE_IPS, the nodes that the Ray cluster is to have; empty where that is not said.
        gpu_wait: GPU_WAIT, seconds to wait for GPUs of the Ray cluster.
        api_key: whether VLLM_API_KEY is set; the key itself stays in the environment.
        api_key_file: HUNYUAN_VLLM_API_KEY_FILE.
        config_home: where a generated key is kept.
        cache_home: where a converted demo model is kept.
        state_home: where the log of a server is kept that was started from a terminal.
    """

    model: str | None = None
    local_ip: str | None = None
    host: str = LOOPBACK
    port: int = DEFAULT_PORT
    tp_size: int | None = None
    socket_ifname: str | None = None
    node_ips: tuple[str, ...] = ()
    gpu_wait: int = DEFAULT_GPU_WAIT
    api_key: bool = False
    api_key_file: Path | None = None
    config_home: Path = Path("~/.config").expanduser()
    cache_home: Path = Path("~/.cache").expanduser()
    state_home: Path = Path("~/.local/state").expanduser()

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Self:
        def text(name: str) -> str | None:
            return environ.get(name, "").strip() or None

        local_ip = text("LOCAL_IP")
        if local_ip and not is_address(local_ip):
            raise UserError(f"LOCAL_IP={local_ip} is not an IP address: use this machine's, as in LOCAL_IP=10.0.0.5")
        node_ips = tuple((text("NODE_IPS") or "").replace(",", " ").split())
        if wrong := [address for address in node_ips if not is_address(address)]:
            raise UserError(f"NODE_IPS: {wrong[0]} is not an IP address: name nodes as in NODE_IPS=10.0.0.5,10.0.0.6")

        def path(name: str, default: str) -> Path:
            return Path(text(name) or default).expanduser()

        gpu_wait = _integer("GPU_WAIT", text("GPU_WAIT"), 0, 10**6)
        return cls(
            model=text("MODEL_PATH"),
            local_ip=local_ip,
            host=text("HOST") or local_ip or LOOPBACK,
            port=_integer("PORT", text("PORT"), 1, 65535) or DEFAULT_PORT,
            tp_size=_integer("TP_SIZE", text("TP_SIZE"), 1, 4096),
            socket_ifname=text("SOCKET_IFNAME"),
            node_ips=node_ips,
            gpu_wait=DEFAULT_GPU_WAIT if gpu_wait is None else gpu_wait,
            api_key=text("VLLM_API_KEY") is not None,
            api_key_file=path(KEY_FILE_VARIABLE, "") if text(KEY_FILE_VARIABLE) else None,
            config_home=path("XDG_CONFIG_HOME", "~/.config"),
            cache_home=path("XDG_CACHE_HOME", "~/.cache"),
            state_home=path("XDG_STATE_HOME", "~/.local/state"),
        )


def _integer(name: str, text: str | None, minimum: int, maximum: int) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or not minimum <= int(text) <= maximum:
        raise UserError(f"{name}={text} is not a number from {minimum} to {maximum}")
    return int(text)
