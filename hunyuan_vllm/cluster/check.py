"""Whether hosts can be one cluster: each looked at over SSH, compared with the others, and reached by the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from hunyuan_vllm.cluster.clock import measure_offset
from hunyuan_vllm.cluster.compare import compare_clocks, compare_files, compare_gpus, compare_versions
from hunyuan_vllm.cluster.logins import Login, Logins
from hunyuan_vllm.cluster.node import Node
from hunyuan_vllm.findings import Section, some

__all__ = ["ClusterCheck", "Wanted"]

HELD = 60  # seconds that a node holds its ports if no one tells it to let go


@dataclass(frozen=True)
class Wanted:
    """What the cluster is to be.

    Attributes:
        ports: those that nodes must reach on each other, besides any that the system chooses.
        model: checkpoint folder, on every node.
        interface: network interface that must carry each host's address.
        gpus: how many each node must have; None for any number that is the same.
    """

    ports: Sequence[int]
    model: str | None = None
    interface: str | None = None
    gpus: int | None = None


@dataclass
class Seen:
    """What was found of one host."""

    login: Login
    node: Node | None = None
    offset: float | None = None
    listening: dict[str, Any] = field(default_factory=dict)
    unreached: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.login.name

    @property
    def address(self) -> str:
        return self.login.address


class ClusterCheck:
    """One run over hosts that are logged in to.

    Args:
        serving: addresses of those whose own Ray has the ports, which is as it should be.
    """

    def __init__(self, logins: Logins, wanted: Wanted, serving: Collection[str] = ()) -> None:
        self._logins = logins
        self._wanted = wanted
        self._serving = serving
        self._all = [Seen(login) for login in logins.all]

    def run(self) -> list[Section]:
        """What was found, the hosts' own sections last."""
        usable = [one for one in self._all if not one.login.problems]
        self._each("nodes", usable, self._examine)
        usable = [one for one in usable if one.node]
        try:
            self._each("listening", usable, self._listen)
            self._each("connections", usable, self._connect)
        finally:
            self._each("letting go", usable, self._let_go)
        return self._sections()

    def _each(self, title: str, some_of: Sequence[Seen], action: Callable[[Seen], None]) -> None:
        by_login = {id(one.login): one for one in some_of}
        self._logins.each(title, [one.login for one in some_of], lambda login: action(by_login[id(login)]))

    def _examine(self, one: Seen) -> None:
        # The clock first, while there is nothing to wait for.
        one.offset = measure_offset(one.login.shell, self._logins.timeout)
        text = self._logins.python(one.login, "hunyuan_vllm.cluster.node", self._wanted.model or "")
        one.node = Node.from_json(text, one.name)

    def _listen(self, one: Seen) -> None:
        words = ["listen", one.address, str(HELD), *map(str, self._wanted.ports)]
        one.listening = json.loads(self._logins.python(one.login, "hunyuan_vllm.cluster.ports", *words))

    def _connect(self, one: Seen) -> None:
        for other in self._all:
            if other is not one and other.listening:
                ports = [str(port) for port in (*other.listening["held"], *other.listening["taken"])]
                words = ["connect", str(min(self._logins.timeout, 5.0)), other.address, *ports]
                one.unreached[other.name] = json.loads(
                    self._logins.python(one.login, "hunyuan_vllm.cluster.ports", *words)
                )

    def _let_go(self, one: Seen) -> None:
        if one.listening:
            one.login.shell.run(f"kill {int(one.listening['pid'])}", self._logins.timeout)

    def _sections(self) -> list[Section]:
        nodes = {one.name: one.node for one in self._all if one.node}
        logins, alike, network = Section("Hosts"), Section("Alike"), Section("Between hosts")
        for one in self._all:
            for problem in one.login.problems:
                logins.problem(one.name, problem.what, problem.remedy)
            if not one.login.problems:
                logins.ok(one.name, f"logged in{self._interface_words(one)}")
        if nodes:
            compare_versions(alike, nodes)
            compare_gpus(alike, nodes, self._wanted.gpus)
            if self._wanted.model:
                compare_files(alike, nodes, self._wanted.model)
        compare_clocks(network, {one.name: one.offset for one in self._all if one.offset is not None})
        self._report_interfaces(network)
        self._report_ports(network)
        return [logins, alike, network, *(node.section for node in nodes.values())]

    def _interface_words(self, one: Seen) -> str:
        found = _carrying(one)
        return f"; {one.address} is on {found}" if found else ""

    def _report_interfaces(self, section: Section) -> None:
        for one in self._all:
            if one.node is None:
                continue
            found, wanted = _carrying(one), self._wanted.interface
            if found is None:
                text = f"no interface of {one.name} has the address {one.address}: it is translated on the way"
                section.problem("interface", text, "give the address that the node itself has")
            elif wanted and found != wanted:
                if wanted in one.node.interfaces:
                    text, more = f"{wanted} of {one.name} does not have {one.address}; {found} does", True
                else:
                    text, more = f"{wanted} is no interface of {one.name}; {one.address} is on {found}", False
                remedy = f"give --ifname {found}" + (f", or the address that {wanted} has" if more else "")
                section.problem("interface", text, remedy)

    def _report_ports(self, section: Section) -> None:
        tried = 0
        for one in self._all:
            if (taken := one.listening.get("taken")) and one.address not in self._serving:
                text = f"{some([str(port) for port in taken])} of {one.name} are taken by another program"
                section.warning("ports", text, "end that, or use it with another address")
            for target, unreached in one.unreached.items():
                tried += 1
                if unreached:
                    lines = [f"{port}: {why}" for port, why in unreached.items()]
                    text = f"{one.name} does not reach {len(lines)} ports of {target}"
                    remedy = "let the nodes reach all ports of each other (firewall, security group, routes)"
                    section.problem("ports", text, remedy, lines)
        if tried and not any(finding.subject == "ports" for finding in section.findings):
            asked = f"{', '.join(map(str, self._wanted.ports))} and one " if self._wanted.ports else "one "
            section.ok("ports", f"each host reaches {asked}that the system chose, on every other")


def _carrying(one: Seen) -> str | None:
    interfaces = one.node.interfaces if one.node else {}
    return next((name for name, addresses in interfaces.items() if one.address in addresses), None)
