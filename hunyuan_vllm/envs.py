"""Every environment variable the package reads, in one typed table.

Read them through these functions, at the edge, once.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder", "cla_sharing", "native_kernels", "take_ssh_password"]

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


def cla_sharing() -> bool:
    """HUNYUAN_VLLM_CLA_SHARING (default 1): 0 gives each cross layer a KV cache of its own, for comparison only."""
    return _flag("HUNYUAN_VLLM_CLA_SHARING", default=True)


def native_kernels() -> bool:
    """HUNYUAN_VLLM_NATIVE_KERNELS (default 1): 0 keeps int8 products on CPUs to plain torch and vLLM's operators."""
    return _flag("HUNYUAN_VLLM_NATIVE_KERNELS", default=True)


def cache_folder() -> Path:
    """Our folder in vLLM's cache: below VLLM_CACHE_ROOT, by default XDG_CACHE_HOME/vllm, by default ~/.cache/vllm."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VLLM_CACHE_ROOT") or Path(caches) / "vllm").expanduser() / "hunyuan-vllm"


def take_ssh_password() -> str | None:
    """HUNYUAN_SSH_PASSWORD, taken out of the environment so that no program started later inherits it."""
    return os.environ.pop("HUNYUAN_SSH_PASSWORD", None) or None
