"""Processes of Ray and of GPUs on this host"""

import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import psutil

from hunyuan_vllm.doctor.probes import System
from hunyuan_vllm.util.machine import await_exits

Value = TypeVar("Value")
RAYLET = "raylet"
PROGRAM = re.compile(r"/ray/core/src/ray/(raylet/raylet|gcs/gcs_server)$")
SESSION = re.compile(r"/session_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d+_\d+/")
DRIVER_LOG = "/logs/python-core-driver-"  # of a program that has joined, such as a notebook or a server
IDLE = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
GRACE, KILL_TIMEOUT = 3.0, 10.0  # seconds


def ray_processes() -> list[psutil.Process]:
    """All of Ray that is this user's, with descendants; without this process and its parents."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        if _is_mine(process) and (
            PROGRAM.search(_ask(process.exe, "").removesuffix(" (deleted)")) or any(_session_files(process))
        ):
            found[process.pid] = process
            for child in _ask(process.children, list[psutil.Process](), True):
                found.setdefault(child.pid, child)
    above = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    return [process for pid, process in found.items() if pid not in above and _lives(process)]


def session_processes(leader: int) -> list[psutil.Process]:
    """The processes of the POSIX session that the process `leader` made, other than zombies."""
    return [
        process for process in psutil.process_iter() if _ask(os.getsid, -1, process.pid) == leader and _lives(process)
    ]


def has_raylet(processes: Iterable[psutil.Process], address: str, gcs: str) -> bool:
    """Whether one of these processes is the node `address` of the cluster at `gcs`."""
    wanted = {f"--node_ip_address={address}", f"--gcs-address={gcs}"}
    return any(
        _ask(process.name, "") == RAYLET and wanted <= set(_ask(process.cmdline, list[str]())) for process in processes
    )


def count_raylets(processes: Iterable[psutil.Process]) -> int:
    """How many nodes, of any clusters, these processes belong to."""
    return sum(_ask(process.name, "") == RAYLET for process in processes)


def workloads(processes: Iterable[psutil.Process]) -> list[str]:
    """What uses that Ray: actors and tasks, as Ray and vLLM title them, and drivers. Idle workers do not count."""
    found = []
    for process in processes:
        title = " ".join(_ask(process.cmdline, list[str]())).strip()
        if title.startswith(("ray::", "VLLM::")):
            found += [] if title.startswith(IDLE) else [title]
        elif any(DRIVER_LOG in file for file in _session_files(process)):
            found.append(f"the driver {process_title(process)}")
    return found


def process_title(process: psutil.Process) -> str:
    """Its name, and its number."""
    words = _ask(process.cmdline, list[str]())
    name = next((word.rpartition("/")[2] for word in words if word.endswith(".py")), None) or _ask(process.name, "")
    return f"{words[0].strip() if words and '::' in words[0] else name} (pid {process.pid})"


def end_processes(find: Callable[[], Sequence[psutil.Process]]) -> tuple[list[str], list[str]]:
    """Terminate what `find` returns, then kill it, until it returns nothing."""
    found = find()
    seen = {process.pid: process_title(process) for process in found}
    for process in found:
        _ask(process.terminate, None)
    await_exits(found, timeout=GRACE)
    deadline = time.monotonic() + KILL_TIMEOUT
    while (left := find()) and time.monotonic() < deadline:
        for process in left:
            seen.setdefault(process.pid, process_title(process))
            _ask(process.kill, None)
        await_exits(left, timeout=1.0)
    stuck = {process.pid for process in left}
    return [text for pid, text in seen.items() if pid not in stuck], [seen[pid] for pid in stuck]


def _ask(call: Callable[..., Value], default: Value, *arguments: Any) -> Value:
    """What a process says of itself; `default` where it has ended or belongs to another user."""
    try:
        return call(*arguments)
    except (psutil.Error, OSError):
        return default


def _lives(process: psutil.Process) -> bool:
    return _ask(process.is_running, False) and _ask(process.status, psutil.STATUS_ZOMBIE) != psutil.STATUS_ZOMBIE


def _is_mine(process: psutil.Process) -> bool:
    uids = _ask(process.uids, None)
    return uids is not None and bool(uids.real == os.getuid())


def _session_files(process: psutil.Process) -> Iterator[str]:
    """Files of a session of Ray that it has open for writing: a process that only reads a log is not part of Ray."""
    directory = f"/proc/{process.pid}/fd"
    try:
        for descriptor in os.listdir(directory):
            entry = f"{directory}/{descriptor}"
            try:
                if os.lstat(entry).st_mode & stat.S_IWUSR and SESSION.search(file := os.readlink(entry)):
                    yield file
            except OSError:
                continue
    except OSError:
        pass


def processes_on_gpus(system: System) -> list[str]:
    """This user's processes that hold GPU memory; empty where there is no GPU, or the driver does not say."""
    try:
        listing = system.output(
            "nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits"
        )
    except OSError:
        return []
    held = []
    for line in listing.splitlines():
        number, _, mebibytes = line.partition(",")
        process = _ask(psutil.Process, None, int(number)) if number.strip().isdigit() else None
        if process is not None and _is_mine(process):
            held.append(f"{process_title(process)}: {mebibytes.strip()} MiB")
    return held
