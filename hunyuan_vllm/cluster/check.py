"""`cluster check`: the hosts compared with one another"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hunyuan_vllm.cluster.logins import Login, Logins
from hunyuan_vllm.cluster.probe import PACKAGES, Node
from hunyuan_vllm.cluster.problems import HostError
from hunyuan_vllm.cluster.ssh import Shell
from hunyuan_vllm.util.findings import Section
from hunyuan_vllm.util.text import some

ROUNDS = 3


def measure_offset(shell: Shell, timeout: float) -> float:
    """Seconds that the host's clock is ahead, from the shortest of some round trips, which errs by half of that.

    Raises:
        HostError: the host does not tell the time.
    """
    best: tuple[float, float] | None = None
    for _ in range(ROUNDS):
        sent = time.time()
        done = shell.run("date +%s.%N", timeout)
        received = time.time()
        try:
            offset = float(done.out) - (sent + received) / 2
        except ValueError:
            raise HostError("date tells no time", "install coreutils there") from None
        best = min(best or (received - sent, offset), (received - sent, offset))
    assert best is not None
    return best[1]


SKEW_WARNING, SKEW_PROBLEM = 0.5, 5.0  # seconds: logs no longer line up; leases and tokens fail


def compare_versions(section: Section, nodes: Mapping[str, Node]) -> None:
    """Python and the packages that talk to each other."""
    for name in ("Python", *PACKAGES):
        found = _groups({host: node.versions.get(name, "absent") for host, node in nodes.items()})
        if len(found) > 1:
            remedy = "make the environments alike: the same checkout, then sh deploy/setup_env.sh, on each"
            section.problem(name, _words(found), remedy)
        elif "absent" not in found:
            section.ok(name, f"{next(iter(found))} everywhere")
        elif name == "ray" and len(nodes) > 1:
            section.problem("ray", "it is installed nowhere, and ranks on several nodes need it", "pip install ray")


def compare_gpus(section: Section, nodes: Mapping[str, Node], wanted: int | None) -> None:
    """Model, memory, driver and number; `wanted` is the number each node must have, None for any that is the same."""
    found = _groups({host: _count(node.gpus) for host, node in nodes.items()})
    if len(found) > 1:
        section.problem("GPUs", _words(found), "use nodes with the same GPUs and the same driver")
    else:
        section.ok("GPUs", f"{next(iter(found))} on each node")
    for host, node in nodes.items():
        if wanted is not None and len(node.gpus) < wanted:
            text = f"{host} has {len(node.gpus)}, {wanted} are wanted"
            section.problem("GPUs", text, "take that node out, or lower --gpus-per-node")


def compare_files(section: Section, nodes: Mapping[str, Node], model: str) -> None:
    """Files of the checkpoint folder, against those of the first node that has it."""
    absent = [host for host, node in nodes.items() if node.files is None]
    if absent:
        section.problem("checkpoint", f"{model} is no folder on {some(absent)}", "copy it there, to the same path")
    have = {host: node.files for host, node in nodes.items() if node.files is not None}
    if not have:
        return
    first, files = next(iter(have.items()))
    wrong = []
    for host, other in have.items():
        wrong += [f"{name}: missing on {host}" for name in files.keys() - other.keys()]
        wrong += [f"{name}: on {host}, missing on {first}" for name in other.keys() - files.keys()]
        for name in files.keys() & other.keys():
            if files[name] != other[name]:
                size, there = files[name].split()[0], other[name].split()[0]
                how = f"{there} bytes on {host}, {size} on {first}" if size != there else f"other content on {host}"
                wrong.append(f"{name}: {how}")
    if wrong:
        text = f"{len(wrong)} files are not the same"
        section.problem(
            "checkpoint", text, f"copy {model} from a node where `hunyuan-vllm check` finds it sound", wrong
        )
    elif not absent:
        section.ok("checkpoint", f"the same {len(files)} files on each node")


def compare_clocks(section: Section, offsets: Mapping[str, float]) -> None:
    """Offsets from this machine's clock, in seconds."""
    if len(offsets) < 2:
        return
    skew = max(offsets.values()) - min(offsets.values())
    late, early = min(offsets, key=lambda host: offsets[host]), max(offsets, key=lambda host: offsets[host])
    remedy = "timedatectl set-ntp true on each, or run chrony; in containers, on their hosts"
    if skew < SKEW_WARNING:
        section.ok("clocks", f"within {skew:.2f} s")
    elif skew < SKEW_PROBLEM:
        section.warning("clocks", f"{early} is {skew:.1f} s ahead of {late}: their logs do not line up", remedy)
    else:
        section.problem("clocks", f"{early} is {skew:,.1f} s ahead of {late}", remedy)


def _groups(values: Mapping[str, str]) -> dict[str, list[str]]:
    """Value → hosts that have it."""
    groups = defaultdict(list)
    for host, value in values.items():
        groups[value].append(host)
    return dict(groups)


def _words(groups: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{value} on {some(hosts)}" for value, hosts in groups.items())


def _count(names: Iterable[str]) -> str:
    counts = {name: len(same) for name, same in _groups({str(i): name for i, name in enumerate(names)}).items()}
    return ", ".join(f"{count} × {name}" for name, count in counts.items()) or "none"


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
        text = self._logins.python(one.login, "hunyuan_vllm.cluster.probe", self._wanted.model or "")
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
