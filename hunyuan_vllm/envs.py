"""Every environment variable the package reads, in one typed table.

Read them through these functions, at the edge, once.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from hunyuan_vllm.util.errors import UserError

__all__ = [
    "CHECKPOINT_CHAT_TEMPLATE",
    "DRAIN_GRACE",
    "LIMIT_RAY_VARIABLES",
    "PROMPT_CLOCK",
    "READY_TIMEOUT",
    "SUPERVISOR_RESTARTS",
    "cache_folder",
    "checkpoint_chat_template",
    "cla_sharing",
    "drain_grace",
    "limit_ray_variables",
    "native_kernels",
    "prompt_clock",
    "ready_timeout",
    "supervisor_restarts",
    "take_ssh_password",
]

CHECKPOINT_CHAT_TEMPLATE = "HUNYUAN_VLLM_CHECKPOINT_CHAT_TEMPLATE"
READY_TIMEOUT = "HUNYUAN_VLLM_READY_TIMEOUT"
DRAIN_GRACE = "HUNYUAN_VLLM_DRAIN_GRACE"
LIMIT_RAY_VARIABLES = "HUNYUAN_VLLM_LIMIT_RAY_VARIABLES"
PROMPT_CLOCK = "HUNYUAN_VLLM_PROMPT_CLOCK"
SUPERVISOR_RESTARTS = "HUNYUAN_VLLM_SUPERVISOR_RESTARTS"

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
    """HUNYUAN_VLLM_NATIVE_KERNELS (default 1): 0 leaves int8 products and routing on CPUs to torch and vLLM."""
    return _flag("HUNYUAN_VLLM_NATIVE_KERNELS", default=True)


def checkpoint_chat_template() -> bool:
    """HUNYUAN_VLLM_CHECKPOINT_CHAT_TEMPLATE (default 0): 1 uses a checkpoint's template though it is known to be
    wrong."""
    return _flag(CHECKPOINT_CHAT_TEMPLATE, default=False)


def limit_ray_variables() -> bool:
    """HUNYUAN_VLLM_LIMIT_RAY_VARIABLES (default 0; `serve` and `batch` set 1): vLLM copies only those variables of this
    process to its Ray workers that steer them."""
    return _flag(LIMIT_RAY_VARIABLES, default=False)


def cache_folder() -> Path:
    """Our folder in vLLM's cache: below VLLM_CACHE_ROOT, by default XDG_CACHE_HOME/vllm, by default ~/.cache/vllm."""
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
