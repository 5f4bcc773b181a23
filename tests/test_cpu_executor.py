"""Where the one rank of an engine runs on CPUs"""

import os
import sys
from types import SimpleNamespace
from typing import Any

import forked_programs
import pytest
from forked_programs import ENGINE_TOO
from vllm.utils.cpu_resource_utils import LogicalCPUInfo

from hunyuan_vllm import cpu_executor, demo
from hunyuan_vllm.cpu_executor import BIND, PLACEMENT, compute_cores, configure_cpu_engine

SPINS, THREADS = "GOMP_SPINCOUNT", "OMP_NUM_THREADS"


def chosen(**parallel: Any) -> object:
    """The executor for an engine with these settings; "uni" if vLLM is left alone."""
    settings = SimpleNamespace(distributed_executor_backend="uni", world_size_across_dp=1, world_size=1, nnodes=1)
    vars(settings).update(parallel)
    configure_cpu_engine(SimpleNamespace(parallel_config=settings))  # type: ignore[arg-type]
    return settings.distributed_executor_backend


@pytest.fixture(autouse=True)
def no_placement(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (BIND, *PLACEMENT, SPINS, THREADS):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


OURS = "hunyuan_vllm.cpu_executor.CPUExecutor"


@pytest.mark.parametrize(
    ("variables", "parallel", "executor"),
    [
        ({}, {}, OURS),
        ({BIND: "nobind"}, {}, OURS),
        ({BIND: "auto"}, {}, "uni"),
        ({BIND: "0-1"}, {}, "uni"),
        ({PLACEMENT[0]: "1"}, {}, "uni"),
        ({}, {"distributed_executor_backend": "mp"}, "mp"),
        ({}, {"distributed_executor_backend": "ray"}, "ray"),
        ({}, {"world_size_across_dp": 2}, "uni"),
    ],
)
def test_only_one_rank_of_an_engine_without_a_placement_of_its_own_moves(
    variables: dict[str, str], parallel: dict[str, Any], executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert chosen(**parallel) == executor


def test_gpus_are_left_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_executor.current_platform, "is_cpu", lambda: False)
    assert chosen() == "uni" and SPINS not in os.environ


def test_threads_that_wait_soon_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen()
    assert int(os.environ[SPINS]) < 100_000
    monkeypatch.setenv(SPINS, "12345")
    chosen()
    assert os.environ[SPINS] == "12345"


def test_hyperthreads_and_other_numa_nodes_do_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of two cores with two hyperthreads each."""
    cpus = [LogicalCPUInfo(id=i, physical_core=i % 4, numa_node=i % 4 // 2) for i in range(8)]
    monkeypatch.setattr(cpu_executor, "get_allowed_cpu_list", lambda: cpus)
    monkeypatch.setattr(cpu_executor, "get_visible_memory_node", lambda: [1, 0])
    cores = compute_cores()
    assert len(cores) == 2 and {core % 4 for core in cores} == {2, 3}
    monkeypatch.setattr(cpu_executor, "get_allowed_cpu_list", lambda: cpus[:2])  # a container may have no core there
    assert compute_cores() == [0, 1]


@pytest.mark.parametrize(
    ("parallel", "variables", "expected"),
    [
        (dict(world_size=2, world_size_across_dp=2), {}, {BIND: "1,3|5,7"}),
        (dict(world_size=4, world_size_across_dp=4), {}, {BIND: "1|3|5|7"}),
        (dict(world_size=3, world_size_across_dp=3), {}, {BIND: "1|3|5"}),
        (dict(world_size=5, world_size_across_dp=5), {}, {BIND: "nobind", THREADS: "1"}),  # more than cores
        (dict(world_size=1, world_size_across_dp=2), {}, {BIND: "nobind", THREADS: "2"}),  # of two engines
        (dict(world_size=2, world_size_across_dp=2), {THREADS: "3"}, {BIND: "nobind", THREADS: "3"}),
        (dict(world_size=2, world_size_across_dp=2), {BIND: "auto"}, {BIND: "auto"}),
        (dict(world_size=2, world_size_across_dp=2), {PLACEMENT[1]: "1"}, {}),
        (dict(world_size=2, world_size_across_dp=2, distributed_executor_backend="ray"), {}, {}),
    ],
)
def test_several_ranks_share_the_cores(
    parallel: dict[str, Any], variables: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two NUMA nodes of two cores with two hyperthreads each; then an engine of one rank in the same process."""
    cpus = [LogicalCPUInfo(id=i, physical_core=i // 2, numa_node=i // 4) for i in range(8)]
    monkeypatch.setattr(cpu_executor, "get_allowed_cpu_list", lambda: cpus)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    chosen(**{"distributed_executor_backend": "mp"} | parallel)
    assert {name: os.environ[name] for name in (BIND, THREADS) if name in os.environ} == expected
    if not variables:
        assert chosen() == OURS and BIND not in os.environ and THREADS not in os.environ


SCRIPT = """
import sys
import psutil
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], enforce_eager=True, kv_cache_memory_bytes=2**26, max_model_len=64, seed=0)
    print(llm.generate(["a"], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))[0].outputs[0].token_ids)
    for process in psutil.Process().children(recursive=True):
        print("child", process.name(), process.num_threads(), len(process.cpu_affinity()))
"""


@pytest.mark.engine
@pytest.mark.slow
def test_a_script_has_one_process_beside_its_own() -> None:
    """The script's main process keeps its cores, and the engine's is the only one that computes."""
    hidden = {BIND, "OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environ = {name: value for name, value in os.environ.items() if name not in hidden} | ENGINE_TOO
    ran = forked_programs.run([sys.executable, "-c", SCRIPT, demo.path()], environ, timeout=400)
    assert ran.returncode == 0, ran.stderr[-4000:]
    children = [line for line in ran.stdout.splitlines() if line.startswith("child VLLM")]
    assert len(children) == 1 and "EngineCor" in children[0], ran.stdout
    assert "The model runs in the engine's process" in ran.stdout + ran.stderr
