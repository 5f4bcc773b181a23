"""`cluster check`: the hosts compared with one another, and the connections between them"""

import json
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from hunyuan_vllm.cluster.connections import Connections
from hunyuan_vllm.cluster.hosts import Host, HostError, report_hosts
from hunyuan_vllm.cluster.probe import FACTS, PACKAGES, NodeFacts
from hunyuan_vllm.cluster.ray_node import checked_ports
from hunyuan_vllm.util.findings import Section
from hunyuan_vllm.util.net import interface_of
from hunyuan_vllm.util.text import differences, plural, some

CLOCK_ROUNDS = 3
SKEW_WARNING, SKEW_PROBLEM = 0.5, 5.0  # seconds: logs do not line up; leases and tokens fail
HELD = 60  # seconds for which a host holds its ports if nobody ends that
PROBE = "hunyuan_vllm.cluster.probe"


@dataclass
class ClusterCheck:
    """One run over hosts that are logged in to.

    Attributes:
        model: checkpoint directory that all hosts must have alike.
        interface: network interface that must have each host's address.
        gpus: how many each host must have; None for any number that is the same.
        serving: addresses of hosts where Ray already has the ports, as it should.
    """

    connections: Connections
    model: str | None = None
    interface: str | None = None
    gpus: int | None = None
    serving: Collection[str] = ()

    def run(self) -> list[Section]:
        """What was found, the hosts' own sections last."""
        each = self.connections.each
        each("hosts", self.connections.usable, self._read_facts)
        read = [host for host in self.connections.hosts if host.facts]
        try:
            each("listening", read, self._listen)
            each("connections", read, self._connect)
        finally:
            each("releasing ports", read, self._release_ports)
        return self._sections()

    def _read_facts(self, host: Host) -> None:
        # The clock first, while the host is idle.
        host.clock_offset = clock_offset(host, self.connections)
        host.facts = FACTS.validate_json(self.connections.run_module(host, PROBE, "facts", self.model or ""))

    def _listen(self, host: Host) -> None:
        words = ["listen", host.address, str(HELD), *map(str, checked_ports())]
        host.listening = json.loads(self.connections.run_module(host, PROBE, *words))

    def _connect(self, host: Host) -> None:
        for other in self.connections.hosts:
            if other is not host and other.listening:
                ports = [str(port) for port in (*other.listening["held"], *other.listening["taken"])]
                words = ["connect", str(min(self.connections.timeout, 5.0)), other.address, *ports]
                host.unreached[other.name] = json.loads(self.connections.run_module(host, PROBE, *words))

    def _release_ports(self, host: Host) -> None:
        if host.listening:
            self.connections.run(host, f"kill {int(host.listening['pid'])}")

    def _sections(self) -> list[Section]:
        hosts = self.connections.hosts
        facts = {host.name: host.facts for host in hosts if host.facts}
        logins, alike, network = Section("Hosts"), Section("Alike"), Section("Between hosts")
        report_hosts(logins, hosts, _logged_in)
        if facts:
            compare_versions(alike, facts)
            compare_gpus(alike, facts, self.gpus)
            if self.model:
                compare_files(alike, facts, self.model)
        offsets = {host.name: host.clock_offset for host in hosts if host.clock_offset is not None}
        compare_clocks(network, offsets)
        self._report_interfaces(network)
        self._report_ports(network)
        return [logins, alike, network, *(Section(name, list(one.findings)) for name, one in facts.items())]

    def _report_interfaces(self, section: Section) -> None:
        for host in self.connections.hosts:
            if host.facts is None:
                continue
            found, wanted = interface_of(host.address, host.facts.interfaces), self.interface
            if found is None:
                text = f"no interface of {host} has the address {host.address}: it is translated on the way"
                section.problem("interface", text, "give the address of the host's own interface")
            elif wanted and found != wanted:
                exists = wanted in host.facts.interfaces
                text = f"{wanted} of {host} has another address" if exists else f"{host} has no interface {wanted}"
                section.problem("interface", f"{text}; {host.address} is on {found}", f"give --ifname {found}")

    def _report_ports(self, section: Section) -> None:
        tried = failed = 0
        for host in self.connections.hosts:
            taken = host.listening.get("taken")
            if taken and host.address not in self.serving:
                verb = "is" if len(taken) == 1 else "are"
                text = f"{some([str(port) for port in taken])} of {host} {verb} used by another program"
                section.warning("ports", text, "end that program, or make it use another address")
                failed += 1
            for target, unreached in host.unreached.items():
                tried += 1
                if unreached:
                    lines = [f"{port}: {why}" for port, why in unreached.items()]
                    text = f"{host} does not reach {plural(len(lines), 'port')} of {target}"
                    remedy = "allow the hosts to reach all ports of each other (firewall, security group, routes)"
                    section.problem("ports", text, remedy, lines)
                    failed += 1
        if tried and not failed:
            section.ok("ports", "each host reaches Ray's ports, and one that the system chose, on every other")


def clock_offset(host: Host, connections: Connections) -> float:
    """Seconds that the host's clock is ahead, from the shortest of some round trips; the error is half of that."""
    trips = []
    for _ in range(CLOCK_ROUNDS):
        sent = time.time()
        text = connections.run(host, "date +%s.%N")
        received = time.time()
        try:
            trips.append((received - sent, float(text) - (sent + received) / 2))
        except ValueError:
            raise HostError("`date +%s.%N` does not print the time", "install coreutils there") from None
    return min(trips)[1]


def compare_versions(section: Section, facts: Mapping[str, NodeFacts]) -> None:
    """Python and the packages that talk to each other."""
    for name in ("Python", *PACKAGES):
        found = {host: one.versions.get(name, "absent") for host, one in facts.items()}
        if different := differences(found):
            remedy = "use identical environments: the same checkout on each host, then sh deploy/setup_env.sh"
            section.problem(name, different, remedy)
        elif "absent" not in found.values():
            section.ok(name, f"{next(iter(found.values()))} everywhere")
        elif name == "ray" and len(facts) > 1:
            section.problem("ray", "it is not installed, but several hosts need it", "pip install ray")


def compare_gpus(section: Section, facts: Mapping[str, NodeFacts], wanted: int | None) -> None:
    """Model, memory, driver and number; `wanted` is the number each host must have, None for any."""
    found = {}
    for host, one in facts.items():
        found[host] = ", ".join(f"{count} × {name}" for name, count in Counter(one.gpus).items()) or "none"
    if different := differences(found):
        section.problem("GPUs", different, "use hosts with the same GPUs and the same driver")
    else:
        section.ok("GPUs", f"{next(iter(found.values()))} on each host")
    for host, one in facts.items():
        if wanted is not None and len(one.gpus) < wanted:
            text = f"{host} has {plural(len(one.gpus), 'GPU')} of {wanted}"
            section.problem("GPUs", text, "leave that host out, or lower --gpus-per-node")


def compare_files(section: Section, facts: Mapping[str, NodeFacts], model: str) -> None:
    """Files of the checkpoint directory, compared with those of the first host that has it."""
    absent = [host for host, one in facts.items() if one.files is None]
    if absent:
        text = f"{model} is not a directory on {some(absent)}"
        section.problem("checkpoint", text, "copy it there, to the same path")
    have = {host: one.files for host, one in facts.items() if one.files is not None}
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
                how = f"{there} bytes on {host}, {size} on {first}" if size != there else f"different content on {host}"
                wrong.append(f"{name}: {how}")
    if wrong:
        text = "1 file differs" if len(wrong) == 1 else f"{len(wrong)} files differ"
        remedy = f"copy {model} from a host where `hunyuan-vllm check` finds no problem"
        section.problem("checkpoint", text, remedy, wrong)
    elif not absent:
        section.ok("checkpoint", f"the same {plural(len(files), 'file')} on each host")


def compare_clocks(section: Section, offsets: Mapping[str, float]) -> None:
    """Offsets from this machine's clock, in seconds."""
    if len(offsets) < 2:
        return
    behind, ahead = min(offsets, key=offsets.__getitem__), max(offsets, key=offsets.__getitem__)
    skew = offsets[ahead] - offsets[behind]
    remedy = "timedatectl set-ntp true on each, or run chrony; in containers, on their hosts"
    if skew < SKEW_WARNING:
        section.ok("clocks", f"within {skew:.2f} s")
    elif skew < SKEW_PROBLEM:
        section.warning("clocks", f"{ahead} is {skew:.1f} s ahead of {behind}: their logs do not line up", remedy)
    else:
        section.problem("clocks", f"{ahead} is {skew:,.1f} s ahead of {behind}", remedy)


def _logged_in(host: Host) -> str:
    found = interface_of(host.address, host.facts.interfaces) if host.facts else None
    return f"logged in; {host.address} is on {found}" if found else "logged in"
