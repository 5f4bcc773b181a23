"""One rank on CPUs, in the engine's own process.

vLLM starts a worker process even for one rank on CPUs: OpenMP reads how its threads are bound when a process starts.
It keeps a core free for the engine's process, which waits for the worker in a busy loop. In one process nothing waits,
every core computes, and vLLM is imported once less.
"""

import os

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_visible_memory_node
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from hunyuan_vllm import envs

logger = init_logger(f"vllm.{__name__}")  # vLLM configures only loggers below its own name
BIND = "VLLM_CPU_OMP_THREADS_BIND"
UNBOUND = "nobind"
# Variables that ask for vLLM's worker process and its binding.
PLACEMENT = ("VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_CPU_SIM_MULTI_NUMA")


def configure_cpu_engine(vllm_config: VllmConfig) -> None:
    """Choose `CPUExecutor` for one rank on CPUs, unless the user chose an executor, or where threads run.

    Engines that this process starts get `envs.OPENMP_WAIT`.
    """
    if not current_platform.is_cpu():
        return
    for name, value in envs.OPENMP_WAIT.items():
        os.environ.setdefault(name, value)
    parallel = vllm_config.parallel_config
    if (
        parallel.distributed_executor_backend == "uni"  # vLLM's default for one rank
        and parallel.world_size_across_dp == 1
        and os.environ.get(BIND, UNBOUND) == UNBOUND
        and not any(name in os.environ for name in PLACEMENT)
    ):
        parallel.distributed_executor_backend = f"{__name__}.{CPUExecutor.__name__}"


def compute_cores() -> list[int]:
    """One logical CPU of each physical core of the first NUMA node, among those this process may use."""
    node = get_visible_memory_node()[0]
    cpus = get_allowed_cpu_list()
    local = [cpu for cpu in cpus if cpu.numa_node == node] or cpus
    return sorted({cpu.physical_core: cpu.id for cpu in local}.values())


class CPUExecutor(UniProcExecutor):
    """Computes in the thread that schedules, with a thread of OpenMP on each core of a NUMA node."""

    def _init_executor(self) -> None:
        if BIND not in os.environ:
            cores = compute_cores()
            os.sched_setaffinity(0, cores)  # this thread, and those of OpenMP, which it starts
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(len(cores))
            logger.info("The model runs in the engine's process, on cores %s", ", ".join(map(str, cores)))
        super()._init_executor()
