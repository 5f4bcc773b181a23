"""The build of vLLM for CPUs with triton beside it, interpreted: see tests/cuda.sh, which runs this directory."""

from __future__ import annotations

import os

# Interpreted kernels cannot be traced, and torch would compile for Triton where it finds it.
os.environ |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}

from triton.backends import Backend, backends  # noqa: E402


class Driver:
    """vLLM takes triton for usable in a build for CPUs if it has a backend "cpu" whose driver is active."""

    @staticmethod
    def is_active() -> bool:
        return True


backends.clear()
backends["cpu"] = Backend(compiler=None, driver=Driver)
