"""Limits of the system, and environment variables that change what runs"""

from __future__ import annotations

import ctypes
import difflib
import importlib.util
import os
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hunyuan_vllm.doctor.probes import System
from hunyuan_vllm.util.findings import Section

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


PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@dataclass(frozen=True)
class Rule:
    """A value of a variable that hurts.

    Attributes:
        hurts: whether this value does, on the build for GPUs if the second argument says so.
        text: what it does.
        remedy: if not to unset it.
    """

    name: str
    hurts: Callable[[str, bool], bool]
    text: str
    remedy: str = ""


def _on(value: str, cuda: bool) -> bool:
    return value.strip().lower() not in ("", "0", "false", "no", "off")


def _off(value: str, cuda: bool) -> bool:
    return bool(value.strip()) and not _on(value, cuda)


def _any(value: str, cuda: bool) -> bool:
    return True


def _one_thread_of_many(value: str, cuda: bool) -> bool:
    cores = len(os.sched_getaffinity(0))
    return not cuda and value.isdigit() and int(value) < cores


RULES = (
    Rule(
        "PYTHONDONTWRITEBYTECODE",
        lambda value, cuda: value != "",  # Python reads "0" as set, too
        "every process compiles every module again: a server takes about twice as long to start",
    ),
    Rule("HF_HUB_OFFLINE", _on, "a model named by its hub name is not downloaded; a folder is not affected"),
    Rule("TRANSFORMERS_OFFLINE", _on, "a model named by its hub name is not downloaded; a folder is not affected"),
    Rule("OMP_NUM_THREADS", _one_thread_of_many, "a rank uses fewer threads than there are cores"),
    Rule("CUDA_LAUNCH_BLOCKING", _on, "the CPU waits for every kernel, which slows decoding"),
    Rule("TORCHDYNAMO_DISABLE", _on, "nothing is compiled: slower on every device"),
    Rule("TORCH_COMPILE_DISABLE", _on, "nothing is compiled: slower on every device"),
    Rule("VLLM_DISABLE_COMPILE_CACHE", _on, "the model is compiled again at every start"),
    Rule("VLLM_TRACE_FUNCTION", _on, "every Python call is logged: unusably slow"),
    Rule("VLLM_LOGGING_LEVEL", lambda value, cuda: value.upper() == "DEBUG", "logs grow fast"),
    Rule("VLLM_CPU_KVCACHE_SPACE", lambda value, cuda: not cuda, "it replaces the cache size that `serve` chooses"),
    Rule("VLLM_WORKER_MULTIPROC_METHOD", lambda value, cuda: cuda and value == "fork",
         "forked workers cannot use CUDA once the parent has", "set it to spawn, or unset it"),
    Rule("NCCL_DEBUG", lambda value, cuda: value.upper() in ("INFO", "TRACE"), "NCCL logs from every rank"),
    Rule("NCCL_P2P_DISABLE", _on, "GPUs of one machine talk through host memory: NVLink is not used"),
    Rule("NCCL_SHM_DISABLE", _on, "GPUs of one machine may talk through the network"),
    Rule("NCCL_IB_DISABLE", _on, "nodes talk over TCP: RDMA is not used"),
    Rule("HUNYUAN_VLLM_CLA_SHARING", _off, "each cross layer has a KV cache of its own: half as many tokens fit"),
    Rule("HUNYUAN_VLLM_NATIVE_KERNELS", _off, "int8 weights on CPUs are multiplied by plain torch, slowly"),
    Rule("VLLM_ALLOW_RUNTIME_LORA_UPDATING", _on, "whoever can send requests can load adapters from this disk"),
    Rule("VLLM_SERVER_DEV_MODE", _on, "vLLM's administrative routes are open to whoever can connect"),
    Rule("VLLM_ALLOW_INSECURE_SERIALIZATION", _on, "data between processes is unpickled, which can run code"),
    Rule("LD_PRELOAD", lambda value, cuda: "cuda" in value or "nccl" in value or "torch" in value,
         "a library is put before those that torch brings"),
)  # fmt: skip


def check_variables(section: Section, system: System, cuda_build: bool, known: frozenset[str] | None) -> None:
    """Report them; `known` are the names that vLLM reads, None if they could not be found out."""
    environ = system.environ
    for rule in RULES:
        value = environ.get(rule.name)
        if value is not None and rule.hurts(value, cuda_build):
            section.warning(rule.name, f"{value!r}: {rule.text}", rule.remedy or "unset it unless that is meant")
    _check_proxies(section, system)
    ours = [name for name in environ if name.startswith("VLLM_")]
    if known is None:
        section.skipped("VLLM_*", "the installed vLLM's list of variables could not be read")
    elif unknown := sorted(name for name in ours if name not in known):
        hints = [f"{name}{_hint(name, known)}" for name in unknown]
        section.warning("VLLM_*", "vLLM knows no such variables", "correct or unset them", hints)
    if not section.findings:
        section.ok("variables", f"none of the {len(RULES)} that commonly hurt is set, and vLLM knows all of VLLM_*")


def known_to_vllm() -> frozenset[str] | None:
    """The variables that vllm/envs.py names, read from its source: importing it would take seconds."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    source = Path(spec.origin).with_name("envs.py")
    if not source.is_file():
        return None
    return frozenset(re.findall(r"\bVLLM_[A-Z0-9_]+\b", source.read_text(encoding="utf-8")))


def _check_proxies(section: Section, system: System) -> None:
    named = [name for name in PROXIES if system.environ.get(name)]
    exempt = system.environ.get("no_proxy", system.environ.get("NO_PROXY", ""))
    if named and not {"127.0.0.1", "localhost", "*"} & {part.strip() for part in exempt.split(",")}:
        text = f"{', '.join(named)} is set without no_proxy: clients here send even requests to 127.0.0.1 there"
        section.warning("proxy", text, "export no_proxy=127.0.0.1,localhost")


def _hint(name: str, known: frozenset[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return f" (is {close[0]} meant?)" if close else ""
