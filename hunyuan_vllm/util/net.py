"""Addresses, network interfaces and ports of this machine, and whether others are reachable"""

import errno
import ipaddress
import re
import socket
from collections.abc import Mapping, Sequence

import psutil

from hunyuan_vllm.util.errors import NotYetError, UserError

LOOPBACK = "127.0.0.1"
# Which interface Gloo, NCCL and torch's tensor pipe use between nodes.
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
CONNECT_TIMEOUT = 5.0  # seconds
HOST_NAME = re.compile(r"(?!-)[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?", re.ASCII)


def is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def local_address(host: str) -> str:
    """The address at which this machine reaches a server of its own that listens on `host`."""
    return {"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host)


def host_port(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def normalise_address(word: str) -> str:
    """One spelling for each address or name: `[FD00:0::1]` is fd00::1, `Node3` is node3."""
    bare = word[1:-1] if word.startswith("[") and word.endswith("]") else word
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        return _check_name(word)
    if address.is_link_local and address.version == 6:
        raise UserError(f"{word} is valid on one link only: give an address that all hosts reach")
    if address.is_unspecified or address.is_multicast:
        raise UserError(f"{word} is not the address of a host")
    return str(address)


def _check_name(word: str) -> str:
    name = word.lower()
    if "@" in word:
        raise UserError(f"{word}: name the user with --user, and give only the host here")
    if re.fullmatch(r".*\]?:\d+", word) and word.count(":") == 1 or re.fullmatch(r"\[.*\]:\d+", word):
        raise UserError(f"{word}: name the port with its own option, and give only the host here")
    if re.fullmatch(r"[\d.]+", name) or not HOST_NAME.fullmatch(name):
        raise UserError(f"{word} is neither an IP address nor a host name")
    return name


def own_interfaces() -> dict[str, tuple[str, ...]]:
    """Network interface → its IP addresses."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: tuple(entry.address.partition("%")[0] for entry in entries if entry.family in families)
        for name, entries in psutil.net_if_addrs().items()
    }


def interface_of(address: str, interfaces: Mapping[str, Sequence[str]]) -> str | None:
    """The interface that has `address`."""
    return next((name for name, addresses in interfaces.items() if address in addresses), None)


def own_addresses() -> set[str]:
    return {address for addresses in own_interfaces().values() for address in addresses}


def why_unreachable(address: str, timeout: float = CONNECT_TIMEOUT) -> str:
    """Why no connection to HOST:PORT opens, or "" where one does. A scheme before it (ray://) is ignored."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    number = int(port)
    if not 0 < number < 65536:
        raise ValueError(f"{number} is not a port")
    try:
        socket.create_connection((host.strip("[]"), number), timeout).close()
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return error.strerror or str(error)
    return ""


def check_port(host: str, port: int) -> None:
    """Raise UserError if a server could not listen there, NotYetError where another process does."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise UserError(f"HOST={host} is not an address: {error.strerror}") from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                by = f" by process {process.pid} ({process.name()})" if (process := listener(port)) else ""
                remedy = "stop that server, or choose another port with PORT="
                raise NotYetError(f"port {port} on {host} is taken{by}: {remedy}") from None
            problems = {
                errno.EACCES: f"port {port} is reserved for root: choose one above 1023 with PORT=",
                errno.EADDRNOTAVAIL: f"{host} is not an address of this machine: set HOST or LOCAL_IP to one that is",
            }
            other = f"cannot listen on {host} port {port}: {error.strerror}"
            raise UserError(problems.get(error.errno or 0, other)) from None


def listener(port: int) -> psutil.Process | None:
    """The process that listens on a TCP port of this machine; None where none does or it is another user's."""
    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if listens and connection.pid:
                return psutil.Process(connection.pid)
    except (psutil.Error, OSError):
        pass
    return None
