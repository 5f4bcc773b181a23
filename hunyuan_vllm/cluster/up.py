"""`cluster up` and `cluster down`"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from hunyuan_vllm.cluster.check import ClusterCheck, Wanted
from hunyuan_vllm.cluster.logins import Login, Logins
from hunyuan_vllm.cluster.members import Member, ask_members
from hunyuan_vllm.cluster.node_setup import NodeSetup
from hunyuan_vllm.cluster.ray_node import Looked
from hunyuan_vllm.cluster.ray_start import find_ray
from hunyuan_vllm.cluster.ray_token import make_token
from hunyuan_vllm.cluster.remote_node import RemoteNodes
from hunyuan_vllm.cluster.tls import sign
from hunyuan_vllm.ray_environment import NODE_FOLDER
from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.findings import Section, Status
from hunyuan_vllm.util.text import some


def bring_down(logins: Logins) -> Section:
    """End what runs, on every host that can be reached."""
    nodes = RemoteNodes(logins)
    ended: dict[str, list[str]] = {}
    holding: dict[str, list[str]] = {}

    def end(login: Login) -> None:
        ended[login.name], holding[login.name] = nodes.stop(login)

    logins.each("ending Ray", logins.usable, end)
    section = Section("Down")
    for login in logins.all:
        for problem in login.problems:
            section.problem(login.name, problem.what, problem.remedy)
        if login.problems:
            continue
        done = ended[login.name]
        section.ok(login.name, f"{len(done)} processes were ended: {some(done)}" if done else "no Ray ran")
        if left := holding[login.name]:
            text = f"GPU memory is still held by {some(left)}, which Ray did not start"
            section.warning(login.name, text, "end them, if they are not meant to be")
    return section


JOIN_TIMEOUT = 30.0  # seconds for nodes that were started to be counted by the head


@dataclass(frozen=True)
class Plan:
    """What the cluster is to be.

    Attributes:
        check: what hosts are checked for before Ray starts.
        gpus: of each node as Ray is told; None for those that it has.
        token_file: where the token is, on every node; None for its place in the home there.
        encrypt: whether nodes talk to each other over TLS.
        variables: more environment variables for Ray and all it starts.
        accept_warnings: whether to go on where the check warns.
        force: whether to end a Ray on which something runs.
    """

    check: Wanted
    gpus: int | None = None
    token_file: str | None = None
    encrypt: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)
    accept_warnings: bool = False
    force: bool = False


class Up:
    """One run, from the head, over hosts that are logged in to.

    Attributes:
        sections: what was found and done, in order.
        setups: how each node is set up, by its address; empty until that is known.
        changed: whether anything was started, ended or written.
    """

    def __init__(self, logins: Logins, plan: Plan, home: Path) -> None:
        self._logins = logins
        self._plan = plan
        self._home = home
        self._nodes = RemoteNodes(logins)
        self._looks: dict[str, Looked] = {}
        self.setups: dict[str, NodeSetup] = {}
        self.sections: list[Section] = []
        self.changed = False

    @property
    def ok(self) -> bool:
        return all(section.sound for section in self.sections)

    def run(self) -> None:
        """As far as it gets; what stops it is a problem in `sections`.

        Raises:
            UserError: this machine is none of the hosts.
        """
        hosts = Section("Hosts")
        self.sections.append(hosts)
        self._logins.each("looking", self._logins.usable, self._look)
        if self._report(hosts, self._logins.all, lambda login: "logged in"):
            return
        self._decide()
        running = self._running()
        if len(running) == len(self.setups):
            hosts.findings.clear()
            hosts.ok("Ray", f"runs as asked for on {some(list(self.setups))}; nothing was changed")
            return
        old = Section("Old Ray")
        self.sections.append(old)
        if not self._end_old(old, running) or not self._check(running):
            return
        ray = Section("Ray")
        self.sections.append(ray)
        if self._start(ray, [login for login in self._logins.all if login.address not in running]):
            self._wait(ray)

    @property
    def _head(self) -> NodeSetup:
        return next(setup for setup in self.setups.values() if setup.is_head)

    def _look(self, login: Login) -> None:
        self._looks[login.address] = self._nodes.look(login)

    def _decide(self) -> None:
        """How each node is to be set up."""
        own = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
        head = next((login.address for login in self._logins.all if login.address in own), None)
        if head is None:
            raise UserError("this machine is none of --hosts: run it on the head, and name the head first")
        for login in self._logins.all:
            looked = self._looks[login.address]
            carrying = (name for name, addresses in looked.interfaces.items() if login.address in addresses)
            folder = Path(looked.home) / NODE_FOLDER / "tls"
            self.setups[login.address] = NodeSetup(
                address=login.address,
                head=head,
                interface=self._plan.check.interface or next(carrying, ""),
                gpus=looked.gpus if self._plan.gpus is None else self._plan.gpus,
                token_file=self._plan.token_file or str(Path(looked.home) / ".ray" / "auth_token"),
                tls=str(folder) if self._plan.encrypt else None,
                variables=self._plan.variables,
            )

    def _running(self) -> set[str]:
        """Addresses of the nodes that run as they should and that the head counts; none where it does not answer."""
        same = {address: setup for address, setup in self.setups.items() if self._looks[address].setup == setup}
        if self._head.address not in same:
            return set()
        # A node that was cut off for a while is dead to the head, though it may not know yet.
        members = ask_members(self._head)[0]
        return {address for address, setup in same.items() if not missing([setup], members)} if members else set()

    def _end_old(self, section: Section, running: set[str]) -> bool:
        """End what Ray there is besides `running`; whether none is left."""
        old = [
            login for login in self._logins.all if login.address not in running and self._looks[login.address].processes
        ]
        for login in old:
            looked = self._looks[login.address]
            if looked.raylets and looked.works and not self._plan.force:
                text = f"another Ray runs there, and on it {some(looked.works)}"
                section.problem(login.name, text, "stop that and `hunyuan-vllm cluster down`, or give --force")
        if not section.sound:
            return False
        ended: dict[str, int] = {}

        def end(login: Login) -> None:
            ended[login.address] = len(self._nodes.stop(login)[0])

        self._logins.each("ending the old Ray", old, end)
        self.changed = self.changed or bool(old)
        return not self._report(
            section, old, lambda login: f"a Ray from before was ended: {ended[login.address]} processes"
        )

    def _check(self, running: set[str]) -> bool:
        """Whether the check lets Ray start."""
        found = ClusterCheck(self._logins, self._plan.check, running).run()
        self.sections[:] = [section for section in self.sections if section.title != "Hosts"] + found
        if not self.ok:
            return False
        warnings = sum(one.status is Status.WARNING for section in found for one in section.findings)
        if warnings and not self._plan.accept_warnings:
            stopped = Section("Not started")
            text = f"the check warns {'once' if warnings == 1 else f'{warnings} times'}"
            stopped.problem("warnings", text, "mend that, or go on all the same with --despite-warnings")
            self.sections.append(stopped)
            return False
        return True

    def _start(self, section: Section, logins: Sequence[Login]) -> bool:
        find_ray()
        token = make_token(Path(self._head.token_file))
        seconds: dict[str, float] = {}

        def start(login: Login) -> None:
            setup = self.setups[login.address]
            signed = None
            if setup.tls and (request := self._nodes.request_certificate(login, setup)):
                signed = sign(Path(self._home) / NODE_FOLDER / "tls", request, setup.address)
            seconds[login.address] = self._nodes.start(login, setup, token, signed)

        head = [login for login in logins if login.address == self._head.address]
        others = [login for login in logins if login.address != self._head.address]
        self.changed = self.changed or bool(logins)
        for title, some_of in (("starting the head", head), ("starting the others", others)):
            self._logins.each(title, some_of, start)
            if self._report(section, some_of, lambda login: f"started in {seconds[login.address]:.1f} s"):
                return False
        return True

    def _wait(self, section: Section) -> None:
        """Until the head counts every node and GPU."""
        deadline = time.monotonic() + JOIN_TIMEOUT
        while True:
            members, silent = ask_members(self._head)
            lacking = missing(self.setups.values(), members)
            if not lacking:
                gpus = sum(member.gpus for member in members)
                section.ok("cluster", f"{len(members)} nodes with {gpus} GPUs; programs on the head join it")
                return
            if time.monotonic() > deadline:
                remedy = "see /tmp/ray/session_latest/logs/raylet.out there, then run this again"
                section.problem("cluster", silent or "it is not whole", remedy, lacking)
                return
            time.sleep(0.5)

    def _report(self, section: Section, logins: Sequence[Login], well: Callable[[Login], str]) -> bool:
        """Note how a step went for each; whether it went wrong for any."""
        for login in logins:
            for problem in login.problems:
                section.problem(login.name, problem.what, problem.remedy)
            if not login.problems:
                section.ok(login.name, well(login))
        return any(login.problems for login in logins)


def missing(setups: Any, members: Sequence[Member]) -> list[str]:
    """What the head does not count, a line each."""
    by_address = {member.address: member for member in members}
    lines = []
    for setup in setups:
        member = by_address.get(setup.address)
        if member is None:
            lines.append(f"{setup.address}: not among the living nodes")
        elif member.gpus < setup.gpus:
            lines.append(f"{setup.address}: {member.gpus} of {setup.gpus} GPUs")
    return lines
