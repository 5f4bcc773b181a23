"""What runs out: shared memory, file descriptors, locked memory, processes, disk; and whether the clock is right."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from hunyuan_vllm.doctor.system import System
from hunyuan_vllm.findings import Section

__all__ = ["check_clock", "check_disk", "check_limits", "check_shared_memory"]

MIB, GIB = 2**20, 2**30
LEAST_SHM, ENOUGH_SHM = 512 * MIB, 8 * GIB  # a container's default is 64 MiB
VLLM_FILES = 65535  # what vLLM raises the soft limit to, up to the hard one
LEAST_PIDS = 4096
LEAST_DISK, ENOUGH_DISK = 2 * GIB, 10 * GIB
TIME_ERROR = 5  # adjtimex: the clock is not synchronised
Limit = Callable[[int], tuple[int, int]]


def check_shared_memory(section: Section, system: System, cuda_build: bool) -> None:
    """/dev/shm, through which vLLM's processes and NCCL's ranks of one machine pass data."""
    folder = system.path("dev/shm")
    if not folder.is_dir():
        section.problem("/dev/shm", "it is not there", "mount a tmpfs on it; in a container --shm-size 16g")
        return
    usage = shutil.disk_usage(folder)
    remedy = "in a container --ipc=host or --shm-size 16g; in Kubernetes an emptyDir with medium: Memory on /dev/shm; "
    remedy += "else mount -o remount,size=16G /dev/shm"
    text = f"{usage.total / GIB:.2f} GiB, {usage.free / GIB:.2f} free"
    if not os.access(folder, os.W_OK):
        section.problem("/dev/shm", "it is not writable", "chmod 1777 /dev/shm, as root")
    elif usage.free < LEAST_SHM:
        section.problem("/dev/shm", f"{text}: ranks would die of a bus error", remedy)
    elif cuda_build and usage.free < ENOUGH_SHM:
        section.warning("/dev/shm", f"{text}; Ray and NCCL over many ranks want {ENOUGH_SHM // GIB} GiB", remedy)
    else:
        section.ok("/dev/shm", text)


def check_limits(section: Section, system: System, limit: Limit = resource.getrlimit) -> None:
    """ulimit and the control group's limit of processes; `limit` is `resource.getrlimit`."""
    soft, hard = limit(resource.RLIMIT_NOFILE)
    if _below(hard, 4096):
        section.problem("open files", f"at most {hard}: too few for a server's connections", _raise("nofile"))
    elif _below(hard, VLLM_FILES):
        section.warning("open files", f"at most {hard}; vLLM asks for {VLLM_FILES} under load", _raise("nofile"))
    else:
        section.ok("open files", f"{_words(soft)}, up to {_words(hard)}")
    soft, _ = limit(resource.RLIMIT_MEMLOCK)
    adapters = sorted(path.name for path in system.path("sys/class/infiniband").glob("*"))
    if adapters and _below(soft, 64 * GIB):
        text = f"{_words(soft)} bytes, and RDMA over {', '.join(adapters)} registers gigabytes"
        section.problem("locked memory", text, f"{_raise('memlock')}; in a container --ulimit memlock=-1")
    else:
        section.ok("locked memory", f"{_words(soft)}{'' if adapters else ' bytes; no RDMA adapter needs more'}")
    pids = system.read("sys/fs/cgroup/pids.max")
    if pids is not None and pids.isdigit() and int(pids) < LEAST_PIDS:
        text = f"the container may have {pids} threads, and an engine has hundreds a rank"
        section.warning("processes", text, "start it with --pids-limit -1")
    soft, _ = limit(resource.RLIMIT_NPROC)
    if _below(soft, LEAST_PIDS):
        section.warning("processes", f"this user may have {soft}", _raise("nproc"))


def check_disk(section: Section, system: System) -> None:
    """Room and permission where compiled code, downloads and temporary files are kept."""
    environ = system.environ
    home = Path(environ.get("HOME", "~")).expanduser()
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    temporary = Path(environ.get("TMPDIR") or tempfile.gettempdir())
    folders = {
        "vLLM's cache": Path(environ.get("VLLM_CACHE_ROOT") or cache / "vllm"),
        "the hub's cache": Path(environ.get("HF_HOME") or cache / "huggingface"),
        "compiled code": Path(environ.get("TORCHINDUCTOR_CACHE_DIR") or temporary),
        "temporary files": temporary,
    }
    free: dict[str, list[str]] = {}
    for name, folder in folders.items():
        there = next(path for path in (folder, *folder.parents) if path.exists())
        space = shutil.disk_usage(there).free
        free.setdefault(f"{space / 1e9:,.0f} GB", []).append(f"{name} ({folder})")
        if not os.access(there, os.W_OK):
            section.problem("disk", f"{name}, {folder}, is not writable", f"chown it, or {_elsewhere(name)}")
        elif space < LEAST_DISK:
            section.problem(
                "disk", f"{space / 1e9:.1f} GB free for {name}, {folder}", f"make room, or {_elsewhere(name)}"
            )
        elif space < ENOUGH_DISK:
            section.warning(
                "disk", f"{space / 1e9:.1f} GB free for {name}, {folder}", f"make room, or {_elsewhere(name)}"
            )
    if not section.findings:
        section.ok("disk", "; ".join(f"{space} free for {', '.join(names)}" for space, names in free.items()))


def check_clock(section: Section, system: System, now: Callable[[], float] = time.time) -> None:
    """A clock that is far off breaks TLS and tokens; between nodes it makes logs and leases useless."""
    built = Path(__file__).stat().st_mtime
    if now() < built - 86400:
        text = f"it says {time.strftime('%Y-%m-%d', time.gmtime(now()))}, which is before this package was installed"
        section.problem("clock", text, "set it: timedatectl set-ntp true")
        return
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(512))
    except AttributeError:
        state = -1
    if state < 0:
        section.skipped("clock", "whether it is synchronised the kernel does not say here")
    elif state == TIME_ERROR and not system.among_several:
        section.ok("clock", "not synchronised with others, which only several nodes need")
    elif state == TIME_ERROR:
        text = "it is not synchronised with the other nodes'"
        section.warning("clock", text, "timedatectl set-ntp true, or run chrony; in a container, on its host")
    else:
        section.ok("clock", "synchronised")


def _below(value: int, least: int) -> bool:
    return value != resource.RLIM_INFINITY and value < least


def _words(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"


def _raise(name: str) -> str:
    return f"raise {name} in /etc/security/limits.conf or the service's unit"


def _elsewhere(name: str) -> str:
    variables = {
        "vLLM's cache": "VLLM_CACHE_ROOT",
        "the hub's cache": "HF_HOME",
        "compiled code": "TORCHINDUCTOR_CACHE_DIR",
    }
    return f"set {variables.get(name, 'TMPDIR')} to another place"
