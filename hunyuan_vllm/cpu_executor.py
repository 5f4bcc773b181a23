"""Where the ranks of an engine run on CPUs: one in the engine's own process, several on cores of their own.

vLLM starts a worker process even for one rank on CPUs: OpenMP reads how its threads are bound when a process starts.
It keeps a core free for the engine's process, which waits for the worker in a busy loop. In one process nothing waits,
every core computes, and vLLM is imported once less. vLLM gives each of several ranks a NUMA node, and refuses more
ranks than nodes: here they share all cores.
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


_variables: dict[str, str] = {}  # of the environment, as they were set for this process's last engine


def configure_cpu_engine(vllm_config: VllmConfig) -> None:
    """Choose `CPUExecutor` for one rank on CPUs, or cores for each of several, unless the user chose an executor, or
    where threads run.

    Engines that this process starts get `envs.OPENMP_WAIT`.
    """
    if not current_platform.is_cpu():
        return
    for name, value in _variables.items():
        if os.environ.get(name) == value:
            del os.environ[name]
    _variables.clear()
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
    elif (
        parallel.distributed_executor_backend in ("uni", "mp")
        and parallel.world_size_across_dp > 1
        and not any(name in os.environ for name in (BIND, *PLACEMENT))
    ):
        one_engine = parallel.world_size_across_dp == parallel.world_size and parallel.nnodes == 1
        _variables.update(placed(parallel.world_size_across_dp, "OMP_NUM_THREADS" not in os.environ and one_engine))
        os.environ.update(_variables)


def placed(ranks: int, bind: bool) -> dict[str, str]:
    """Variables that give each rank of this machine the same number of cores: its own, with `bind`, where there are
    enough."""
    by_core = {(cpu.numa_node, cpu.physical_core): cpu.id for cpu in get_allowed_cpu_list()}
    cores = [str(by_core[core]) for core in sorted(by_core)]
    share = len(cores) // ranks
    if bind and share:
        return {BIND: "|".join(",".join(cores[rank * share : (rank + 1) * share]) for rank in range(ranks))}
    return {BIND: UNBOUND} | ({} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(share, 1))})


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
