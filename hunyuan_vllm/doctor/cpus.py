"""The processor: which kernels its features pick, how it is divided, how much of it is ours, and a compiler for it."""

from __future__ import annotations

import ctypes
import os
import re

from hunyuan_vllm.doctor.system import System
from hunyuan_vllm.findings import Section
from hunyuan_vllm.server.machine import can_compile, free_memory

__all__ = ["check_compiler", "check_cpu", "check_memory", "check_numa"]

LEAST_MEMORY = 4 << 30


def check_cpu(section: Section, system: System, cuda_build: bool) -> None:
    """Instruction sets, and the cores this process may use against those it was promised."""
    text = system.read("proc/cpuinfo")
    if text is None:
        section.skipped("CPU", "/proc/cpuinfo cannot be read")
        return
    flags = set(_field(text, "flags").split()) | set(_field(text, "Features").split())
    model = _field(text, "model name") or "a processor without a name"
    section.ok("CPU", f"{model.strip()}, {_cores()} cores for this process; {_kernels(flags)}")
    if not cuda_build and not flags & {"avx2", "asimd"}:
        text = "it has neither AVX2 nor NEON, which vLLM's build for CPUs needs"
        section.problem("CPU", text, "use another machine")
    quota = _quota(system)
    if quota is not None and quota < _cores():
        text = f"the container may use {quota:g} cores' time and sees {_cores()}: threads will wait for each other"
        remedy = (
            f"start it with --cpuset-cpus for {max(int(quota), 1)} cores, or set OMP_NUM_THREADS={max(int(quota), 1)}"
        )
        section.warning("CPU quota", text, remedy)


def check_numa(section: Section, system: System, cuda_build: bool) -> None:
    """NUMA nodes, libnuma, and the kernel's balancing, which moves pages under a running engine."""
    nodes = sorted(path.name for path in system.path("sys/devices/system/node").glob("node[0-9]*"))
    if not nodes:
        section.skipped("NUMA", "the kernel does not show its nodes")
    elif len(nodes) == 1:
        section.ok("NUMA", "one node")
    else:
        section.ok("NUMA", f"{len(nodes)} nodes; on CPUs one rank a node (TP_SIZE={len(nodes)}) reads its own memory")
    if len(nodes) > 1 and system.read("proc/sys/kernel/numa_balancing") not in (None, "0"):
        text = "the kernel's automatic balancing is on, and moves memory while the engine reads it"
        section.warning("NUMA", text, "as root: sysctl kernel.numa_balancing=0")
    if not cuda_build:
        try:
            ctypes.CDLL("libnuma.so.1")
        except OSError:
            text = "libnuma.so.1 is missing, which vLLM's build for CPUs needs"
            section.problem("libnuma", text, "apt-get install libnuma1 (Debian, Ubuntu), numactl-libs (Fedora, RHEL)")


def check_memory(section: Section, system: System) -> None:
    free = free_memory(system.path("sys"))
    if free < LEAST_MEMORY:
        text = f"{free / 2**30:.1f} GiB is free; the engine's processes alone take about 4"
        section.problem("memory", text, "end other programs, or raise the container's limit")
    else:
        section.ok("memory", f"{free / 2**30:.1f} GiB free for a server")


def check_compiler(section: Section, system: System, cuda_build: bool) -> None:
    """torch.compile on CPUs and our own CPU kernels are C++; on GPUs a C compiler builds Triton's launchers."""
    if can_compile(system.environ):
        section.ok("compiler", "a C++ compiler and Python's headers are here")
        return
    what = "Triton, which starts its kernels through a small C program," if cuda_build else "torch.compile"
    text = f"no C++ compiler or no Python headers, so {what} does not work"
    remedy = "apt-get install g++ python3-dev (Debian, Ubuntu), dnf install gcc-c++ python3-devel (Fedora, RHEL)"
    if cuda_build:
        section.problem("compiler", text, remedy)
    else:
        section.warning(
            "compiler",
            f"{text}: `serve` runs the model uncompiled, int8 weights on plain torch, and both slowly",
            remedy,
        )


def _field(cpuinfo: str, name: str) -> str:
    match = re.search(rf"^{name}\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    return match[1] if match else ""


def _kernels(flags: set[str]) -> str:
    if "amx_bf16" in flags:
        return "AMX: vLLM's packed kernels"
    if "avx512_bf16" in flags:
        vnni = "and VNNI" if "avx512_vnni" in flags else "without VNNI, which W8A8 wants"
        weights = "our own kernel" if "avx512vbmi" in flags else "plain torch, slowly, as VBMI is missing"
        return f"AVX-512 with BF16 {vnni}: packed kernels; int8 weights on {weights}"
    if "avx512f" in flags:
        return "AVX-512 without BF16: bfloat16 is computed through float32, slowly"
    if "avx2" in flags:
        return "AVX2 only: works, slowly"
    return "ARM with BF16" if "bf16" in flags else "no instructions for bfloat16"


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _quota(system: System) -> float | None:
    """Cores' time that a control group allows, None where it does not limit it."""
    words = (system.read("sys/fs/cgroup/cpu.max") or "").split()
    if len(words) == 2 and words[0] != "max":
        return int(words[0]) / int(words[1])
    return None
