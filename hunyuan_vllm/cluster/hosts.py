"""The hosts of a cluster as an operator names them: addresses or names, checked, each once."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.net import is_loopback, normalise_address

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
        for address in filter(is_loopback, addresses):
            raise UserError(
                f"{address} is another machine on every host: give the address by which the others reach it"
            )
    return [Host(address, port, user) for address in addresses]
