"""A host of the cluster: how the operator named it, the connection to it, and all that is known of it"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hunyuan_vllm.util.errors import UserError
from hunyuan_vllm.util.findings import Finding, Section
from hunyuan_vllm.util.net import is_loopback, normalise_address

if TYPE_CHECKING:
    from hunyuan_vllm.cluster.account import Account
    from hunyuan_vllm.cluster.host_keys import PublicKey, Trust
    from hunyuan_vllm.cluster.probe import NodeFacts
    from hunyuan_vllm.cluster.ray_node import NodeSetup
    from hunyuan_vllm.cluster.ray_start import RayState
    from hunyuan_vllm.cluster.ssh import Shell

USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\$?", re.ASCII)


class HostError(UserError):
    """A step fails on one host; the others continue."""

    def __init__(self, text: str, remedy: str) -> None:
        super().__init__(f"{text}: {remedy}")
        self.text, self.remedy = text, remedy


@dataclass(eq=False)
class Host:
    """One host. A step that fails adds to `problems`; what a step has not found out yet is None.

    Attributes:
        name: as the operator gave it: IPv4 or IPv6 address (without brackets), or a name in lower case.
        local: it is the machine that this runs on, where no connection is needed.
        address: the IP address that it was reached at.
        host_key, trust: its host key and why that is trusted.
        account: the user's SSH files.
        password_needed: the key logins failed and a password was not given.
        public_line: the key by which it logs in to others, as a line of authorized_keys.
        key_made: whether that key was made in this run.
        changed: files (below the home directory) that this run wrote.
        facts: what must agree between hosts.
        clock_offset: seconds that its clock is ahead.
        listening: the ports that it holds for the check.
        unreached: other host → port → why it was not reached from here.
        ray: what runs of Ray.
        setup: how Ray is to be set up.
    """

    name: str
    port: int = 22
    user: str = ""
    local: bool = False
    shell: Shell | None = None
    address: str = ""
    problems: list[Finding] = field(default_factory=list)

    hostname: str | None = None
    host_key: PublicKey | None = None
    trust: Trust | None = None
    account: Account | None = None
    password_needed: HostError | None = None
    public_line: str | None = None
    key_made: bool = False
    changed: list[str] = field(default_factory=list)

    facts: NodeFacts | None = None
    clock_offset: float | None = None
    listening: Mapping[str, Any] = field(default_factory=dict)
    unreached: dict[str, dict[str, str]] = field(default_factory=dict)

    ray: RayState | None = None
    setup: NodeSetup | None = None

    @property
    def known_hosts_name(self) -> str:
        """What `known_hosts` calls it: `[address]:port`, or the address alone on port 22."""
        return self.name if self.port == 22 else f"[{self.name}]:{self.port}"

    def __str__(self) -> str:
        return self.name

    def problem(self, text: str, remedy: str) -> None:
        finding = Finding(self.name, text, remedy)
        if finding not in self.problems:
            self.problems.append(finding)

    def attempt(self, action: Callable[[Host], object]) -> None:
        """Run one step and record what stops it."""
        try:
            action(self)
        except HostError as error:
            self.problem(error.text, error.remedy)


def report_hosts(section: Section, hosts: Sequence[Host], success: Callable[[Host], str]) -> bool:
    """Add each host's problems to a section, or the text of its success; whether there were no problems."""
    for host in hosts:
        section.findings += host.problems
        if not host.problems:
            section.ok(host.name, success(host))
    return not any(host.problems for host in hosts)


def parse_hosts(text: str, port: int, user: str, option: str = "--ips") -> list[Host]:
    """The hosts in a list like "10.0.0.1, 10.0.0.2 node3,fd00::4", without repetitions. It came from `option`."""
    if not USER.fullmatch(user):
        raise UserError(f"--user {user!r} is not a user name")
    names = list(dict.fromkeys(normalise_address(word) for word in re.split(r"[\s,]+", text) if word))
    if not names:
        example = f"{option} 10.0.0.1,10.0.0.2"
        raise UserError(f"{option} names no host: give addresses separated by commas, such as {example}")
    if len(names) > 1:
        for name in filter(is_loopback, names):
            raise UserError(
                f"{name} is a different machine on every host: give the address by which the others reach it"
            )
    return [Host(name, port, user) for name in names]
