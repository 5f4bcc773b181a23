"""The hosts of a cluster as an operator names them: addresses or names, checked, each once."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from hunyuan_vllm.util.errors import UserError

__all__ = ["Host", "normalise_address", "parse_hosts"]

NAME = re.compile(r"(?!-)[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?", re.ASCII)
USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\$?", re.ASCII)


@dataclass(frozen=True)
class Host:
    """An account on a host.

    Attributes:
        address: IPv4 or IPv6 address (without brackets), or a name in lower case.
        port: of its SSH server.
        user: who logs in.
    """

    address: str
    port: int
    user: str

    @property
    def known_hosts_name(self) -> str:
        """What `known_hosts` calls it: `[address]:port`, or the address alone on port 22."""
        return self.address if self.port == 22 else f"[{self.address}]:{self.port}"

    def __str__(self) -> str:
        return self.address


def parse_hosts(text: str, port: int, user: str, option: str = "--ips") -> list[Host]:
    """The hosts in a list like "10.0.0.1, 10.0.0.2 node3,fd00::4", repetitions dropped. It came from `option`.

    Raises:
        UserError: there is none, or one that no other host could be reached by.
    """
    if not USER.fullmatch(user):
        raise UserError(f"--user {user!r} is not a user name")
    addresses = list(dict.fromkeys(normalise_address(word) for word in re.split(r"[\s,]+", text) if word))
    if not addresses:
        example = f"{option} 10.0.0.1,10.0.0.2"
        raise UserError(f"{option} names no host: give addresses with commas between them, such as {example}")
    if len(addresses) > 1:
        for address in addresses:
            _refuse_loopback(address)
    return [Host(address, port, user) for address in addresses]


def normalise_address(word: str) -> str:
    """One spelling for each address: `[FD00:0::1]` is fd00::1, `Node3` is node3.

    Raises:
        UserError: it is neither an address nor a name.
    """
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
        raise UserError(f"{word}: name the user with --user, and only the host here")
    if re.fullmatch(r".*\]?:\d+", word) and word.count(":") == 1 or re.fullmatch(r"\[.*\]:\d+", word):
        raise UserError(f"{word}: name the port with its own option, and only the host here")
    if re.fullmatch(r"[\d.]+", name) or not NAME.fullmatch(name):
        raise UserError(f"{word} is neither an IP address nor a host name")
    return name


def _refuse_loopback(address: str) -> None:
    try:
        loopback = ipaddress.ip_address(address).is_loopback
    except ValueError:
        loopback = address == "localhost"
    if loopback:
        raise UserError(f"{address} is another machine on every host: give the address by which the others reach it")
