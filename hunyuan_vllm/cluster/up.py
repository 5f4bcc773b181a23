"""`cluster up` and `cluster down`"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hunyuan_vllm.cluster.check import ClusterCheck
from hunyuan_vllm.cluster.connections import Connections
from hunyuan_vllm.cluster.hosts import Host, HostError, report_hosts
from hunyuan_vllm.cluster.ray_node import NodeSetup, make_token
from hunyuan_vllm.cluster.ray_nodes import ask_members, missing_members
from hunyuan_vllm.cluster.ray_start import START_TIMEOUT, RayState, find_ray
from hunyuan_vllm.cluster.status import read_ray
from hunyuan_vllm.cluster.tls import sign
from hunyuan_vllm.ray_environment import NODE_DIRECTORY
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.findings import Section
from hunyuan_vllm.util.net import interface_of, own_addresses
from hunyuan_vllm.util.text import plural, some

JOIN_TIMEOUT = 30.0  # seconds for started nodes to be counted by the head


def bring_down(connections: Connections) -> Section:
    """End Ray on every host that can be reached."""
    stopped = _stop_ray(connections, "ending Ray", connections.usable)
    section = Section("Down")

    def success(host: Host) -> str:
        ended = stopped[host]["ended"]
        return f"ended {plural(len(ended), 'process')}: {some(ended)}" if ended else "no Ray ran"

    report_hosts(section, connections.hosts, success)
    for host, done in stopped.items():
        if holding := done["on_gpus"]:
            text = f"GPU memory is still held by {some(holding)}, which Ray did not start"
            section.warning(host.name, text, "end them if they should not run")
    return section


def _stop_ray(connections: Connections, title: str, hosts: Sequence[Host]) -> dict[Host, dict[str, list[str]]]:
    """End all of Ray on these hosts: what ended there, and this user's other processes that hold GPU memory."""
    stopped: dict[Host, dict[str, list[str]]] = {}

    def stop(host: Host) -> None:
        done = connections.ask_ray(host, {"do": "stop"})
        if done["stuck"]:
            raise HostError(
                f"these do not exit: {', '.join(done['stuck'])}", "they are stuck in a driver: reboot the host"
            )
        stopped[host] = done

    connections.each(title, hosts, stop)
    return stopped


@dataclass
class Up:
    """One run, from the head, over hosts that are logged in to. Each host's `setup` says how its node is set up.

    Attributes:
        home: where the head keeps the cluster's authority.
        model, interface: what the check wants of each host.
        gpus: of each node as Ray is told; None for those that it has.
        logical_gpus: hosts need not have that many.
        token_file: where the token is, on every node; None for its place in the home there.
    """

    connections: Connections
    home: Path
    model: str | None = None
    interface: str | None = None
    gpus: int | None = None
    logical_gpus: bool = False
    token_file: str | None = None
    encrypt: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)
    force: bool = False
    sections: list[Section] = field(default_factory=list)
    changed: bool = False

    @property
    def ok(self) -> bool:
        return all(section.sound for section in self.sections)

    def run(self) -> None:
        """As far as possible; what stops it is a problem in `sections`."""
        read_ray(self.connections)
        if not report_hosts(self._section("Hosts"), self.connections.hosts, lambda host: "logged in"):
            return
        self._plan_setups()
        running = self._running()
        if len(running) == len(self.connections.hosts):
            self.sections.clear()
            names = [host.address for host in self.connections.hosts]
            self._section("Hosts").ok("Ray", f"already runs as requested on {some(names)}; nothing was changed")
            return
        if self._end_old_ray(running) and self._check(running) and self._start(running):
            self._wait_for_members()

    def _section(self, title: str) -> Section:
        self.sections.append(Section(title))
        return self.sections[-1]

    def _plan_setups(self) -> None:
        own = own_addresses()
        head = next((host.address for host in self.connections.hosts if host.address in own), None)
        if head is None:
            raise UserError("this machine is not among --hosts: run it on the head, and name the head first")
        for host in self.connections.hosts:
            ray = _ray(host)
            host.setup = NodeSetup(
                address=host.address,
                head=head,
                interface=self.interface or interface_of(host.address, ray.interfaces) or "",
                gpus=ray.gpus if self.gpus is None else self.gpus,
                token_file=self.token_file or str(Path(ray.home) / ".ray" / "auth_token"),
                tls=str(Path(ray.home) / NODE_DIRECTORY / "tls") if self.encrypt else None,
                variables=self.variables,
            )

    def _head(self) -> NodeSetup:
        return next(host.setup for host in self.connections.hosts if host.setup and host.setup.is_head)

    def _running(self) -> set[Host]:
        """The hosts that run as they should and that the head counts; none where it does not answer."""
        same = {host: host.setup for host in self.connections.hosts if host.setup and _ray(host).setup == host.setup}
        if self._head() not in same.values():
            return set()
        # A node that was cut off for a while is dead to the head, though it may not know yet.
        members, _ = ask_members(self._head())
        return {host for host, setup in same.items() if not missing_members([setup], members)} if members else set()

    def _end_old_ray(self, running: set[Host]) -> bool:
        """End what Ray there is except on `running`; whether none is left."""
        section = self._section("Old Ray")
        old = [host for host in self.connections.hosts if host not in running and _ray(host).processes]
        for host in old:
            ray = _ray(host)
            if ray.raylets and ray.workloads and not self.force:
                text = f"another Ray runs there, used by {some(ray.workloads)}"
                section.problem(host.name, text, "stop that and run `hunyuan-vllm cluster down`, or give --force")
        if not section.sound:
            return False
        stopped = _stop_ray(self.connections, "ending the old Ray", old)
        self.changed = self.changed or bool(old)
        return report_hosts(
            section, old, lambda host: f"an earlier Ray was ended: {plural(len(stopped[host]['ended']), 'process')}"
        )

    def _check(self, running: set[Host]) -> bool:
        """Whether the check allows Ray to start."""
        serving = {host.address for host in running}
        gpus = None if self.logical_gpus else self.gpus
        found = ClusterCheck(self.connections, self.model, self.interface, gpus, serving).run()
        self.sections[:] = [section for section in self.sections if section.title != "Hosts"] + found
        return self.ok

    def _start(self, running: set[Host]) -> bool:
        """Start the head, then the others; whether all started."""
        section = self._section("Ray")
        find_ray()
        token = make_token(Path(self._head().token_file))
        seconds: dict[Host, float] = {}

        def start(host: Host) -> None:
            assert host.setup is not None
            setup, ask = asdict(host.setup), self.connections.ask_ray
            request = {"do": "start", "setup": setup, "token": token}
            if self.encrypt and (csr := ask(host, {"do": "certificate", "setup": setup})["request"]):
                signed = sign(self.home / NODE_DIRECTORY / "tls", csr, host.address)
                request |= dict(zip(("certificate", "authority"), signed, strict=True))
            seconds[host] = ask(host, request, START_TIMEOUT + 30)["seconds"]

        stopped = [host for host in self.connections.hosts if host not in running]
        self.changed = self.changed or bool(stopped)
        head = [host for host in stopped if host.address == self._head().address]
        others = [host for host in stopped if host not in head]
        for title, hosts in (("starting the head", head), ("starting the others", others)):
            self.connections.each(title, hosts, start)
            if not report_hosts(section, hosts, lambda host: f"started in {seconds[host]:.1f} s"):
                return False
        return True

    def _wait_for_members(self) -> None:
        """Until the head counts every node and GPU."""
        section = self.sections[-1]
        setups = [host.setup for host in self.connections.hosts if host.setup]
        deadline = time.monotonic() + JOIN_TIMEOUT
        while True:
            members, silence = ask_members(self._head())
            missing = missing_members(setups, members)
            if not missing:
                gpus = plural(sum(member.gpus for member in members), "GPU")
                text = f"{plural(len(members), 'node')} with {gpus}; programs on the head join it"
                return section.ok("cluster", text)
            if time.monotonic() > deadline:
                remedy = "see /tmp/ray/session_latest/logs/raylet.out there, then run this again"
                return section.problem("cluster", silence or "nodes or GPUs are missing", remedy, missing)
            time.sleep(0.5)


def _ray(host: Host) -> RayState:
    assert host.ray is not None
    return host.ray
