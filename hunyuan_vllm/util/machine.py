"""What several commands need of this machine: free memory, a compiler, installed distributions, exits of processes"""

import importlib.metadata
import os
import shutil
import sysconfig
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil


def is_installed(distribution: str) -> bool:
    return installed_version(distribution) is not None


def installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def free_memory(system: Path = Path("/sys")) -> int:
    """Available bytes: of the machine, a container's limit and the first core's NUMA node, whichever has least."""
    free = [psutil.virtual_memory().available]
    try:
        group = system / "fs/cgroup"
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free.append(max(limit - used, 0))
    except (OSError, ValueError):
        pass
    for node in (system / "devices/system/cpu" / f"cpu{min(os.sched_getaffinity(0))}").glob("node*/meminfo"):
        lines = [line.replace(":", "").split() for line in node.read_text().splitlines()]
        kilobytes = {words[2]: int(words[3]) for words in lines}
        free.append(1024 * sum(kilobytes[name] for name in ("MemFree", "Active(file)", "Inactive(file)")))
    return min(free)


def await_exits(processes: Iterable[psutil.Process], timeout: float) -> None:
    """Wait until they have exited, at most so many seconds, and reap those that are this process's children."""
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        try:
            psutil.wait_procs(processes, timeout=left)
            return
        except (psutil.Error, OSError):  # Linux 6.15 has another error for one that is being reaped than psutil expects
            time.sleep(min(left, 0.05))


def can_compile(environ: Mapping[str, str]) -> bool:
    """Whether a C++ compiler and Python's headers are there."""
    compilers = [environ["CXX"]] if environ.get("CXX") else ["g++", "clang++"]
    has_compiler = any(shutil.which(name, path=environ.get("PATH")) for name in compilers)
    return has_compiler and Path(sysconfig.get_paths()["include"], "Python.h").exists()
