"""Whether hosts can be one cluster: each looked at over SSH, compared with the others, and reached by the others."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hunyuan_vllm.cluster.clock import measure_offset
from hunyuan_vllm.cluster.compare import compare_clocks, compare_files, compare_gpus, compare_versions
from hunyuan_vllm.cluster.connection import Credentials
from hunyuan_vllm.cluster.hosts import Host
from hunyuan_vllm.cluster.machine import Machine
from hunyuan_vllm.cluster.node import Node
from hunyuan_vllm.cluster.problems import HostError, last_line
from hunyuan_vllm.cluster.report import HostReport
from hunyuan_vllm.cluster.shell import RemoteShell, load_script
from hunyuan_vllm.cluster.steps import Steps
from hunyuan_vllm.cluster.trust import Fingerprints
from hunyuan_vllm.findings import Section, some

__all__ = ["ClusterCheck", "Wanted"]

SET_UP = "run python3 deploy/login_ssh.py first"
HELD = 60  # seconds that a node holds its ports if no one tells it to let go


@dataclass(frozen=True)
class Wanted:
    """What the cluster is to be.

    Attributes:
        python: the interpreter of the environment, on every node.
        ports: those that nodes must reach on each other, besides any that the system chooses.
        model: checkpoint folder, on every node.
        interface: network interface that must carry each host's address.
        gpus: how many each node must have; None for any number that is the same.
    """

    python: str
    ports: Sequence[int]
    model: str | None = None
    interface: str | None = None
    gpus: int | None = None


@dataclass
class Seen:
    """One host on its way through the check."""

    machine: Machine
    address: str = ""
    node: Node | None = None
    offset: float | None = None
    listening: dict[str, Any] = field(default_factory=dict)
    unreached: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.machine.report.name


class ClusterCheck:
    """One run; hosts are logged in to with this machine's keys and known host keys, as `login_ssh.py` leaves them."""

    def __init__(
        self, hosts: Sequence[Host], wanted: Wanted, credentials: Credentials, known_hosts: str, steps: Steps,
        timeout: float,
    ) -> None:  # fmt: skip
        self._wanted = wanted
        self._credentials = credentials
        self._known_hosts = known_hosts
        self._steps = steps
        self._timeout = timeout
        self._all = [Seen(Machine(host, HostReport(host.address), timeout)) for host in hosts]

    def run(self) -> list[Section]:
        """What was found, the hosts' own sections last. Connections are closed whatever ends it."""
        try:
            self._each("logins", self._all, self._log_in)
            usable = [one for one in self._all if one.machine.shell]
            self._each("nodes", usable, self._examine)
            usable = [one for one in usable if one.node]
            try:
                self._each("listening", usable, self._listen)
                self._each("connections", usable, self._connect)
            finally:
                self._each("letting go", usable, self._let_go)
            return self._sections()
        finally:
            for one in self._all:
                one.machine.close()

    def _each(self, title: str, some_of: Sequence[Seen], action: Callable[[Seen], None]) -> None:
        self._steps.run(title, some_of, lambda one: one.machine.attempt(lambda machine: action(one)))

    def _log_in(self, one: Seen) -> None:
        one.machine.fetch_host_key(self._known_hosts, Fingerprints({}))
        if one.machine.report.trust is None:
            raise HostError("its host key is not known here", SET_UP)
        one.machine.log_in(self._credentials)
        if one.machine.password_needed:
            raise HostError("it takes none of this user's keys", SET_UP)
        assert isinstance(one.machine.shell, RemoteShell)
        one.address = one.machine.shell.address

    def _examine(self, one: Seen) -> None:
        assert one.machine.shell is not None
        one.offset = measure_offset(one.machine.shell, self._timeout)  # first, while there is nothing to wait for
        text = self._python(one, "hunyuan_vllm.cluster.node", self._wanted.model or "")
        one.node = Node.from_json(text, one.name)

    def _listen(self, one: Seen) -> None:
        words = [one.address, str(HELD), *map(str, self._wanted.ports)]
        one.listening = json.loads(self._python(one, "hunyuan_vllm.cluster.ports", "listen", *words))

    def _connect(self, one: Seen) -> None:
        for other in self._all:
            if other is not one and other.listening:
                ports = [str(port) for port in (*other.listening["held"], *other.listening["taken"])]
                words = ["connect", str(min(self._timeout, 5.0)), other.address, *ports]
                one.unreached[other.name] = json.loads(self._python(one, "hunyuan_vllm.cluster.ports", *words))

    def _let_go(self, one: Seen) -> None:
        if one.listening and one.machine.shell:
            one.machine.shell.run(f"kill {int(one.listening['pid'])}", self._timeout)

    def _python(self, one: Seen, module: str, *words: str) -> str:
        """What a module of ours prints on a node."""
        assert one.machine.shell is not None
        names = {"python": self._wanted.python, "local_ip": one.address}
        arguments = shlex.join([module, *words])
        done = one.machine.shell.run(load_script("python"), max(60.0, self._timeout), arguments=arguments, **names)
        if done.status != 0:
            raise HostError(
                f"{self._wanted.python} runs no {module}: {last_line(done.errors) or f'status {done.status}'}",
                "put the same checkout at the same path and run sh deploy/setup_env.sh there, or name its --python",
            )
        return done.out.decode(errors="replace")

    def _sections(self) -> list[Section]:
        nodes = {one.name: one.node for one in self._all if one.node}
        logins, alike, network = Section("Hosts"), Section("Alike"), Section("Between hosts")
        for one in self._all:
            for problem in one.machine.report.problems:
                logins.problem(one.name, problem.what, problem.remedy)
            if not one.machine.report.problems:
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
            if taken := one.listening.get("taken"):
                text = f"{some([str(port) for port in taken])} of {one.name} are taken by another program"
                section.warning("ports", text, "if it is an old Ray: ray stop --force there")
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
