"""For tests: vLLM's CPU platform, which Ray may schedule. With this directory's parent on PYTHONPATH, RAY_ON_CPU=1."""

import os

__all__ = ["register"]


def register() -> str | None:
    """What vLLM calls for the entry point: the platform's name, or None to leave vLLM as it is."""
    return "ray_on_cpu.platform.RayOnCpuPlatform" if os.environ.get("RAY_ON_CPU") == "1" else None
