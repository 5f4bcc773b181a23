"""Limits, disk, network and environment variables of this machine"""

import os
import resource
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

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
MIN_DISK, ENOUGH_DISK = 2 * GIB, 10 * GIB
CONNECT_TIMEOUT = 2.0  # seconds
Limit = Callable[[int], tuple[int, int]]


def check_shared_memory(section: Section, system: System, cuda_build: bool) -> None:
    """/dev/shm, through which vLLM's processes and NCCL's ranks of one machine pass data."""
    directory = system.path("dev/shm")
    if not directory.is_dir():
        section.problem("/dev/shm", "it does not exist", "mount a tmpfs on it; in a container --shm-size 16g")
        return
    usage = shutil.disk_usage(directory)
    remedy = "in a container --ipc=host or --shm-size 16g; in Kubernetes an emptyDir with medium: Memory on /dev/shm; "
    remedy += "else mount -o remount,size=16G /dev/shm"
    text = f"{usage.total / GIB:.2f} GiB, {usage.free / GIB:.2f} free"
    if not os.access(directory, os.W_OK):
        section.problem("/dev/shm", "it is not writable", "chmod 1777 /dev/shm, as root")
    elif usage.free < MIN_SHM:
        section.problem("/dev/shm", f"{text}: a bus error would kill the ranks", remedy)
    elif cuda_build and usage.free < ENOUGH_SHM:
        section.warning("/dev/shm", f"{text}; Ray and NCCL over many ranks need {ENOUGH_SHM // GIB} GiB", remedy)
    else:
        section.ok("/dev/shm", text)


def check_limits(section: Section, system: System, limit: Limit = resource.getrlimit) -> None:
    """Open files and locked memory; `limit` is `resource.getrlimit`."""

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


def check_disk(section: Section, system: System) -> None:
    """Room and permission where compiled code, downloads and temporary files are kept."""
    environ = system.environ
    home = Path(environ.get("HOME", "~")).expanduser()
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    temporary = Path(environ.get("TMPDIR") or tempfile.gettempdir())
    directories = (
        ("vLLM's cache", "VLLM_CACHE_ROOT", cache / "vllm"),
        ("the hub's cache", "HF_HOME", cache / "huggingface"),
        ("compiled code", "TORCHINDUCTOR_CACHE_DIR", temporary),
        ("temporary files", "TMPDIR", temporary),
    )
    free: dict[str, list[str]] = {}
    for name, variable, default in directories:
        directory = Path(environ.get(variable) or default)
        existing = next(path for path in (directory, *directory.parents) if path.exists())
        space = shutil.disk_usage(existing).free
        free.setdefault(f"{space / 1e9:,.0f} GB", []).append(f"{name} ({directory})")
        elsewhere = f"set {variable} to another place"
        if not os.access(existing, os.W_OK):
            section.problem("disk", f"{name}, {directory}, is not writable", f"chown it, or {elsewhere}")
        elif space < ENOUGH_DISK:
            report = section.problem if space < MIN_DISK else section.warning
            report("disk", f"{space / 1e9:.1f} GB free for {name}, {directory}", f"free space, or {elsewhere}")
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
    elif system.environ.get("RAY_ADDRESS") and not system.environ.get("LOCAL_IP"):
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


ON = {  # variable → what it does where it is set and not 0
    "PYTHONDONTWRITEBYTECODE": "a server takes about twice as long to start",
    "TORCHDYNAMO_DISABLE": "nothing is compiled: slower on every device",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "anyone who can send requests can load adapters from this disk",
    "VLLM_SERVER_DEV_MODE": "vLLM's administrative routes are open to anyone who can connect",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "data between processes is unpickled, which can run code",
}
OFF = {  # what it does where it is 0
    "HUNYUAN_VLLM_CLA_SHARING": "each cross layer has a KV cache of its own: half as many tokens fit",
    "HUNYUAN_VLLM_NATIVE_KERNELS": "int8 weights on CPUs are multiplied by plain torch, slowly",
}


def check_variables(section: Section, system: System) -> None:
    """Variables that slow the server or open it."""
    for rules, on in ((ON, True), (OFF, False)):
        for name, effect in rules.items():
            value = system.environ.get(name, "").strip()
            if value and (value.lower() not in ("0", "false", "no", "off")) == on:
                section.warning(name, f"{value!r}: {effect}", "unset it unless that is intended")
    if not section.findings:
        section.ok("variables", "no variable slows or opens the server")
