"""Limits, disk, network and environment variables of this machine"""

import difflib
import importlib.util
import os
import re
import resource
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hunyuan_vllm.doctor.probes import System
from hunyuan_vllm.envs import Settings
from hunyuan_vllm.ray_environment import current_cluster_file
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.findings import Section
from hunyuan_vllm.util.machine import installed_version
from hunyuan_vllm.util.net import INTERFACE_VARIABLES, check_port, own_addresses, own_interfaces, why_unreachable

MIB, GIB = 2**20, 2**30
MIN_SHM, ENOUGH_SHM = 512 * MIB, 8 * GIB  # a container's default is 64 MiB
VLLM_FILES = 65535  # what vLLM raises the soft limit to, up to the hard one
MIN_PROCESSES = 4096
MIN_DISK, ENOUGH_DISK = 2 * GIB, 10 * GIB
CONNECT_TIMEOUT = 2.0  # seconds
Limit = Callable[[int], tuple[int, int]]


def check_shared_memory(section: Section, system: System, cuda_build: bool) -> None:
    """/dev/shm, through which vLLM's processes and NCCL's ranks of one machine pass data."""
    folder = system.path("dev/shm")
    if not folder.is_dir():
        section.problem("/dev/shm", "it does not exist", "mount a tmpfs on it; in a container --shm-size 16g")
        return
    usage = shutil.disk_usage(folder)
    remedy = "in a container --ipc=host or --shm-size 16g; in Kubernetes an emptyDir with medium: Memory on /dev/shm; "
    remedy += "else mount -o remount,size=16G /dev/shm"
    text = f"{usage.total / GIB:.2f} GiB, {usage.free / GIB:.2f} free"
    if not os.access(folder, os.W_OK):
        section.problem("/dev/shm", "it is not writable", "chmod 1777 /dev/shm, as root")
    elif usage.free < MIN_SHM:
        section.problem("/dev/shm", f"{text}: a bus error would kill the ranks", remedy)
    elif cuda_build and usage.free < ENOUGH_SHM:
        section.warning("/dev/shm", f"{text}; Ray and NCCL over many ranks need {ENOUGH_SHM // GIB} GiB", remedy)
    else:
        section.ok("/dev/shm", text)


def check_limits(section: Section, system: System, limit: Limit = resource.getrlimit) -> None:
    """ulimit and the control group's limit of processes; `limit` is `resource.getrlimit`."""

    def below(value: int, minimum: int) -> bool:
        return value != resource.RLIM_INFINITY and value < minimum

    def words(value: int) -> str:
        return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"

    def raise_it(name: str) -> str:
        return f"raise {name} in /etc/security/limits.conf or the service's unit"

    soft, hard = limit(resource.RLIMIT_NOFILE)
    if below(hard, 4096):
        section.problem("open files", f"at most {hard}: too few for a server's connections", raise_it("nofile"))
    elif below(hard, VLLM_FILES):
        section.warning("open files", f"at most {hard}; vLLM needs {VLLM_FILES} under load", raise_it("nofile"))
    else:
        section.ok("open files", f"{words(soft)}, up to {words(hard)}")
    soft, _ = limit(resource.RLIMIT_MEMLOCK)
    adapters = sorted(path.name for path in system.path("sys/class/infiniband").glob("*"))
    if adapters and below(soft, 64 * GIB):
        text = f"{words(soft)} bytes, and RDMA over {', '.join(adapters)} registers gigabytes"
        section.problem("locked memory", text, f"{raise_it('memlock')}; in a container --ulimit memlock=-1")
    else:
        section.ok("locked memory", f"{words(soft)}{'' if adapters else ' bytes; no RDMA adapter needs more'}")
    pids = system.read("sys/fs/cgroup/pids.max")
    if pids is not None and pids.isdigit() and int(pids) < MIN_PROCESSES:
        text = f"the container may have {pids} threads, and each rank of an engine has hundreds"
        section.warning("processes", text, "start it with --pids-limit -1")
    soft, _ = limit(resource.RLIMIT_NPROC)
    if below(soft, MIN_PROCESSES):
        section.warning("processes", f"this user may have {soft}", raise_it("nproc"))


def check_disk(section: Section, system: System) -> None:
    """Room and permission where compiled code, downloads and temporary files are kept."""
    environ = system.environ
    home = Path(environ.get("HOME", "~")).expanduser()
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    temporary = Path(environ.get("TMPDIR") or tempfile.gettempdir())
    folders = (
        ("vLLM's cache", "VLLM_CACHE_ROOT", cache / "vllm"),
        ("the hub's cache", "HF_HOME", cache / "huggingface"),
        ("compiled code", "TORCHINDUCTOR_CACHE_DIR", temporary),
        ("temporary files", "TMPDIR", temporary),
    )
    free: dict[str, list[str]] = {}
    for name, variable, default in folders:
        folder = Path(environ.get(variable) or default)
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        space = shutil.disk_usage(existing).free
        free.setdefault(f"{space / 1e9:,.0f} GB", []).append(f"{name} ({folder})")
        elsewhere = f"set {variable} to another place"
        if not os.access(existing, os.W_OK):
            section.problem("disk", f"{name}, {folder}, is not writable", f"chown it, or {elsewhere}")
        elif space < ENOUGH_DISK:
            report = section.problem if space < MIN_DISK else section.warning
            report("disk", f"{space / 1e9:.1f} GB free for {name}, {folder}", f"free space, or {elsewhere}")
    if not section.findings:
        section.ok("disk", "; ".join(f"{space} free for {', '.join(names)}" for space, names in free.items()))


def check_settings(section: Section, system: System) -> Settings:
    """The variables that `serve` reads; its defaults where they are wrong."""
    try:
        return Settings.read(system.environ)
    except UserError as error:
        text, _, remedy = str(error).partition(": ")
        section.problem("settings", text, remedy or "correct it, or unset it")
        return Settings()


def check_server_port(section: Section, host: str, port: int) -> None:
    try:
        check_port(host, port)
    except UserError as error:
        text, _, remedy = str(error).partition(": ")
        section.problem("port", text, f"{remedy}; if it is this server, nothing is wrong")
    else:
        section.ok("port", f"{port} on {host} is free for the server")


def check_ray(section: Section, system: System, version: Callable[[str], str | None] = installed_version) -> None:
    """Ray, which only several nodes need: installed, and whether its cluster answers. Its start checks its ports."""
    address = system.environ.get("RAY_ADDRESS", "").strip()
    installed = version("ray")
    if installed is None:
        if address:
            text = "RAY_ADDRESS is set and Ray is not installed"
            section.problem("Ray", text, "pip install ray, or unset RAY_ADDRESS")
        else:
            text = "it is not installed; a single machine does not need it"
            section.skipped("Ray", text, "for several nodes: pip install ray")
        return
    current = current_cluster_file(system.environ)
    if address in ("", "auto"):
        address = current.read_text().strip() if current.exists() else ""
    if not address:
        section.ok("Ray", f"{installed}, not running")
        return
    try:
        why = why_unreachable(address, CONNECT_TIMEOUT)
    except ValueError:
        section.problem("Ray", f"RAY_ADDRESS={address} is not host:port", "correct it, or unset it")
        return
    if why:
        text = f"no cluster answers at {address} ({why})"
        section.problem("Ray", text, f"start it, or unset RAY_ADDRESS and delete {current} if that is outdated")
    else:
        section.ok("Ray", f"{installed}, and a cluster answers at {address}; all nodes must have this version")


def check_name(section: Section, system: System, resolve: Callable[[str], str] = socket.gethostbyname) -> None:
    """The address of this machine's own name, which Gloo and Ray use among several nodes."""
    name = socket.gethostname()
    try:
        address = resolve(name)
    except OSError as error:
        text = f"{name} has no address ({error.strerror or error})"
        section.warning("host name", text, f"add it to /etc/hosts, or set LOCAL_IP: ranks look {name} up")
        return
    if not address.startswith("127."):
        section.ok("host name", f"{name} is {address}")
    elif system.among_several and not system.environ.get("LOCAL_IP"):
        text = f"{name} is {address}, which is a different machine on every node"
        section.warning("host name", text, "set LOCAL_IP, or give it its real address in /etc/hosts")
    else:
        section.ok("host name", f"{name} is {address}; for several nodes set LOCAL_IP")


def check_interfaces(section: Section, system: System, settings: Settings) -> None:
    """The interfaces and the address that variables name, compared with this machine's."""
    interfaces = own_interfaces()
    wrong = []
    for variable in ("SOCKET_IFNAME", *INTERFACE_VARIABLES):
        value = system.environ.get(variable, "").strip()
        # NCCL takes a list, prefixes, "=" for whole names and "^" for what is excluded.
        names = [] if value.startswith("^") else [name.removeprefix("=") for name in value.split(",") if name]
        if names and not any(known.startswith(name) for name in names for known in interfaces):
            wrong.append(f"{variable}={value}")
    if wrong:
        text = f"{', '.join(wrong)}: no such interface; there are {', '.join(sorted(interfaces))}"
        section.problem("interfaces", text, "name one of these, or unset the variable")
    if settings.local_ip and settings.local_ip not in own_addresses():
        text = f"LOCAL_IP={settings.local_ip} is not an address of this machine"
        section.problem("interfaces", text, "set it to one that is")
    if section.sound:
        section.ok("interfaces", ", ".join(sorted(interfaces)))


class Rule(NamedTuple):
    """A value of a variable that does harm. `applies` gets the value, and whether vLLM is the build for GPUs."""

    name: str
    applies: Callable[[str, bool], bool]
    effect: str


def _on(value: str, cuda: bool) -> bool:
    return value.strip().lower() not in ("", "0", "false", "no", "off")


def _off(value: str, cuda: bool) -> bool:
    return bool(value.strip()) and not _on(value, cuda)


def _fewer_than_cores(value: str, cuda: bool) -> bool:
    return not cuda and value.isdigit() and int(value) < len(os.sched_getaffinity(0))


RULES = (
    # Python reads "0" as set, too.
    Rule("PYTHONDONTWRITEBYTECODE", lambda value, cuda: value != "", "a server takes about twice as long to start"),
    Rule("HF_HUB_OFFLINE", _on, "a model named by its hub name is not downloaded; a folder is not affected"),
    Rule("OMP_NUM_THREADS", _fewer_than_cores, "a rank uses fewer threads than there are cores"),
    Rule("CUDA_LAUNCH_BLOCKING", _on, "the CPU waits for every kernel, which slows decoding"),
    Rule("TORCHDYNAMO_DISABLE", _on, "nothing is compiled: slower on every device"),
    Rule("VLLM_CPU_KVCACHE_SPACE", lambda value, cuda: not cuda, "it replaces the cache size that `serve` chooses"),
    Rule("VLLM_WORKER_MULTIPROC_METHOD", lambda value, cuda: cuda and value == "fork",
         "forked workers cannot use CUDA after the parent has used it: use spawn"),
    Rule("NCCL_P2P_DISABLE", _on, "GPUs of one machine communicate through host memory: NVLink is not used"),
    Rule("NCCL_IB_DISABLE", _on, "nodes communicate over TCP: RDMA is not used"),
    Rule("HUNYUAN_VLLM_CLA_SHARING", _off, "each cross layer has a KV cache of its own: half as many tokens fit"),
    Rule("HUNYUAN_VLLM_NATIVE_KERNELS", _off, "int8 weights on CPUs are multiplied by plain torch, slowly"),
    Rule("VLLM_ALLOW_RUNTIME_LORA_UPDATING", _on, "anyone who can send requests can load adapters from this disk"),
    Rule("VLLM_SERVER_DEV_MODE", _on, "vLLM's administrative routes are open to anyone who can connect"),
    Rule("VLLM_ALLOW_INSECURE_SERIALIZATION", _on, "data between processes is unpickled, which can run code"),
)  # fmt: skip
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def check_variables(section: Section, system: System, cuda_build: bool, known: frozenset[str] | None) -> None:
    """Variables that do harm; `known` are the names that vLLM reads, None if they could not be found out."""
    environ = system.environ
    for rule in RULES:
        value = environ.get(rule.name)
        if value is not None and rule.applies(value, cuda_build):
            section.warning(rule.name, f"{value!r}: {rule.effect}", "unset it unless that is intended")
    proxies = [name for name in PROXIES if environ.get(name)]
    exempt = environ.get("no_proxy", environ.get("NO_PROXY", ""))
    if proxies and not {"127.0.0.1", "localhost", "*"} & {part.strip() for part in exempt.split(",")}:
        text = f"{', '.join(proxies)} is set without no_proxy: requests to 127.0.0.1 use the proxy, too"
        section.warning("proxy", text, "export no_proxy=127.0.0.1,localhost")
    ours = [name for name in environ if name.startswith("VLLM_")]
    if known is None:
        section.skipped("VLLM_*", "the installed vLLM's list of variables could not be read")
    elif unknown := sorted(name for name in ours if name not in known):
        hints = [f"{name}{_hint(name, known)}" for name in unknown]
        section.warning("VLLM_*", "vLLM has no such variables", "correct or unset them", hints)
    if not section.findings:
        section.ok("variables", "no variable slows down or exposes the server, and vLLM knows all VLLM_* variables")


def known_to_vllm() -> frozenset[str] | None:
    """The variables that vllm/envs.py names, read from its source: importing it would take seconds."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    source = Path(spec.origin).with_name("envs.py")
    if not source.is_file():
        return None
    return frozenset(re.findall(r"\bVLLM_[A-Z0-9_]+\b", source.read_text(encoding="utf-8")))


def _hint(name: str, known: frozenset[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return f" (did you mean {close[0]}?)" if close else ""
