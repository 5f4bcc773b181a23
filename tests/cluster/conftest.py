"""Three hosts with SSH servers, made once a module and clean before each test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hosts import HOME, Host, Network, Sshd, need_hosts
from operator_at_host import PASSWORD, PORT, log_in, options


@dataclass(frozen=True)
class Trio:
    """Hosts a, b, c, and their SSH servers."""

    network: Network
    servers: list[Sshd]

    @property
    def hosts(self) -> list[Host]:
        return [server.host for server in self.servers]

    @property
    def ips(self) -> str:
        return ",".join(host.address for host in self.hosts)


@pytest.fixture(scope="module")
def trio_of_module() -> Iterator[Trio]:
    need_hosts()
    with Network() as network:
        yield Trio(network, [Sshd(network.add(name), PORT, PASSWORD) for name in ("hosta", "hostb", "hostc")])


@pytest.fixture(scope="module")
def archives() -> dict[str, bytes]:
    """Host name → its ~/.ssh after a first run."""
    return {}


@pytest.fixture
def joined(trio: Trio, archives: dict[str, bytes]) -> Trio:
    """The three hosts after a first run: each may log in to each."""
    for host in trio.hosts:
        if host.name in archives:
            host.run("tar", "-C", HOME, "-x", input=archives[host.name], text=False)
    if not archives:
        done = log_in(trio.hosts[0], trio.ips, "--password-file", f"{HOME}/password", *options(*trio.servers))
        assert done.status == 0, done
        archives |= {host.name: host.run("tar", "-C", HOME, "-c", ".ssh", text=False).stdout for host in trio.hosts}
    return trio


@pytest.fixture
def trio(trio_of_module: Trio) -> Trio:
    for host in trio_of_module.hosts:
        host.sh("rm -rf ~/.ssh; umask 077; cat >~/password", input=PASSWORD + "\n")
    return trio_of_module
