"""What ranks and clients connect to: ports, this machine's own name, its interfaces, and Ray."""

from __future__ import annotations

import socket
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import psutil

from hunyuan_vllm.doctor.probes import System
from hunyuan_vllm.settings import Settings
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.findings import Section
from hunyuan_vllm.util.net import INTERFACE_VARIABLES, check_port, why_unreachable

__all__ = ["check_interfaces", "check_name", "check_ports", "check_ray", "check_settings"]

RAY_PORTS = {6379: "GCS, which nodes join", 10001: "clients", 8265: "dashboard"}
CONNECT_TIMEOUT = 2.0  # seconds


def check_settings(section: Section, system: System) -> Settings:
    """The variables that `serve` reads; its defaults where they cannot be read."""
    try:
        settings = Settings.read(system.environ)
    except UserError as error:
        text, _, remedy = str(error).partition(": ")
        section.problem("settings", text, remedy or "correct it, or unset it")
        return Settings()
    return settings


def check_ports(section: Section, host: str, port: int) -> None:
    """The server's port."""
    try:
        check_port(host, port)
    except UserError as error:
        text, _, remedy = str(error).partition(": ")
        section.problem("port", text, f"{remedy}; where it is this server, all is well")
    else:
        section.ok("port", f"{port} on {host} is free for the server")


def check_ray(section: Section, system: System, version: Callable[[str], str] = metadata.version) -> None:
    """Ray, which only several nodes need: installed, running or free to start."""
    try:
        installed = version("ray")
    except metadata.PackageNotFoundError:
        if system.environ.get("RAY_ADDRESS"):
            section.problem(
                "Ray", "RAY_ADDRESS is set and Ray is not installed", "pip install ray, or unset RAY_ADDRESS"
            )
        else:
            section.skipped(
                "Ray", "it is not installed; one machine does not need it", "for several nodes: pip install ray"
            )
        return
    noted = Path(system.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    address = system.environ.get("RAY_ADDRESS", "").strip()
    if address in ("", "auto"):
        address = noted.read_text().strip() if noted.exists() else ""
    if address:
        _check_cluster(section, installed, address, noted)
        return
    taken = []
    for port in RAY_PORTS:
        try:
            check_port("0.0.0.0", port)
        except UserError as error:
            taken.append(str(error).partition(":")[0])
    if taken:
        text = "no Ray runs here, and something else is on its ports"
        section.warning("Ray", text, "end that, or give `ray start` other ports", taken)
    else:
        section.ok("Ray", f"{installed}, not running; its ports {', '.join(map(str, RAY_PORTS))} are free")


def check_name(section: Section, system: System, resolve: Callable[[str], str] = socket.gethostbyname) -> None:
    """What this machine's name leads to, which Gloo and Ray take for its address among several nodes."""
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
        text = f"{name} leads to {address}, where other nodes would find themselves"
        section.warning("host name", text, "set LOCAL_IP, or give it its real address in /etc/hosts")
    else:
        section.ok("host name", f"{name} is {address}; for several nodes set LOCAL_IP")


def check_interfaces(section: Section, system: System, settings: Settings) -> None:
    """Interfaces that variables name, against those that are here."""
    interfaces = {name: [entry.address for entry in entries] for name, entries in psutil.net_if_addrs().items()}
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
    addresses = {address for all_ in interfaces.values() for address in all_}
    if settings.local_ip and settings.local_ip not in addresses:
        text = f"LOCAL_IP={settings.local_ip} is not an address of this machine"
        section.problem("interfaces", text, "set it to one that is")
    if section.sound:
        section.ok("interfaces", ", ".join(sorted(interfaces)))


def _check_cluster(section: Section, installed: str, address: str, noted: Path) -> None:
    try:
        why = why_unreachable(address, CONNECT_TIMEOUT)
    except ValueError:
        section.problem("Ray", f"RAY_ADDRESS={address} is not host:port", "correct it, or unset it")
        return
    if why:
        text = f"no cluster answers at {address} ({why})"
        section.problem("Ray", text, f"start it, or unset RAY_ADDRESS and delete {noted} if it is an old one's")
    else:
        section.ok("Ray", f"{installed}, and a cluster answers at {address}; nodes must all have this version")
