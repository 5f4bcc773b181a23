"""Facts about this machine that several commands need: free memory, a compiler, installed distributions"""

import importlib.metadata
import os
import shutil
import sysconfig
from collections.abc import Mapping
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


def can_compile(environ: Mapping[str, str]) -> bool:
    """Whether a C++ compiler and Python's headers are there."""
    compilers = [environ["CXX"]] if environ.get("CXX") else ["g++", "clang++"]
    has_compiler = any(shutil.which(name, path=environ.get("PATH")) for name in compilers)
    return has_compiler and Path(sysconfig.get_paths()["include"], "Python.h").exists()
