"""One machine on its way to mutual logins: what each step finds out about it or does to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from hunyuan_vllm.cluster.account import AUTHORIZED_KEYS, KNOWN_HOSTS, Account, look
from hunyuan_vllm.cluster.authorized_keys import admit
from hunyuan_vllm.cluster.connection import Credentials, PasswordNeeded, fetch_host_key, log_in
from hunyuan_vllm.cluster.hosts import Host
from hunyuan_vllm.cluster.known_hosts import keys_of, pin
from hunyuan_vllm.cluster.problems import HostError, Problem
from hunyuan_vllm.cluster.prove import prove
from hunyuan_vllm.cluster.public_key import PublicKey
from hunyuan_vllm.cluster.report import HostReport, Pair
from hunyuan_vllm.cluster.shell import LocalShell, RemoteShell, Shell
from hunyuan_vllm.cluster.trust import Fingerprints, judge

__all__ = ["Machine"]


@dataclass
class Machine:
    """A host, or this machine (`host` is None) where it is not one of them.

    The methods are the actions of the steps; they raise HostError, which `attempt` keeps in the report.

    Attributes:
        password_needed: what to say if no password is to be had.
        public_line: the key by which it logs in to others, as a line of authorized_keys.
    """

    host: Host | None
    report: HostReport
    timeout: float
    shell: Shell | None = None
    account: Account | None = None
    password_needed: Problem | None = None
    public_line: str | None = None

    def attempt(self, action: Callable[[Machine], None]) -> None:
        """Run one step's action, and note what stops it."""
        try:
            action(self)
        except HostError as error:
            self.report.add(error.problem)

    def is_account_of(self, other: Machine) -> bool:
        """Whether both are the same account on the same system."""
        mine, its = self.account, other.account
        return mine is not None and its is not None and mine.account == its.account

    def fetch_host_key(self, known_hosts: str, fingerprints: Fingerprints) -> None:
        """Learn its host key, and whether that is believed without asking."""
        assert self.host is not None
        known = keys_of(known_hosts, self.host.known_hosts_name)
        self.report.host_key = fetch_host_key(self.host, known, self.timeout)
        self.report.trust = judge(self.host, self.report.host_key, known_hosts, fingerprints)

    def log_in(self, credentials: Credentials) -> None:
        """Log in, or note that a password is needed."""
        assert self.host is not None and self.report.host_key is not None
        self.password_needed = None
        try:
            self.shell = RemoteShell(log_in(self.host, self.report.host_key, credentials, self.timeout))
        except PasswordNeeded as error:
            self.password_needed = error.problem

    def look(self) -> None:
        """Read its SSH files; where there is no host to log in to, this machine's own."""
        self.shell = self.shell or LocalShell()
        self.account = look(self.shell, self.timeout)
        self.report.hostname = self.account.hostname
        if not {"ssh", "ssh-keygen"} <= self.account.tools:
            self.report.add(Problem("it has no SSH client to log in to others with", "install openssh-client there"))

    def make_key(self) -> None:
        """Close its SSH files to others, and make its key if it has none."""
        assert self.account is not None
        self.report.changed += self.account.tighten()
        if "ssh-keygen" not in self.account.tools:
            return
        self.public_line, self.report.key_made = self.account.make_key()
        self.report.user_key = PublicKey.parse(self.public_line.split())
        if self.report.key_made:
            self.report.changed.append(".ssh/id_ed25519")

    def admit(self, public_lines: Iterable[str]) -> None:
        """Let the holders of these keys log in."""
        assert self.account is not None
        self._write(AUTHORIZED_KEYS, admit(self.account.texts[AUTHORIZED_KEYS], public_lines))

    def pin(self, keys: Mapping[Host, PublicKey], replace: Iterable[Host]) -> None:
        """Pin host keys; one that contradicts a key pinned before is left out unless it is to replace that one."""
        assert self.account is not None
        text = self.account.texts[KNOWN_HOSTS]
        replaced = {host.known_hosts_name for host in replace}
        pinned = {}
        for host, key in keys.items():
            name = host.known_hosts_name
            known = keys_of(text, name)
            others = [other for other in known if other.type == key.type]
            if key in known or not others or name in replaced:
                pinned[name] = key
            else:
                self.report.add(_contradiction(host, key, others[0]))
        self._write(KNOWN_HOSTS, pin(text, pinned, replaced))

    def prove(self, target: Host) -> Pair:
        """Log in from here to there."""
        assert self.shell is not None
        try:
            problem = prove(self.shell, target, self.timeout)
        except HostError as error:
            problem = error.problem
        return Pair(self.report.name, target.address, problem)

    def close(self) -> None:
        if isinstance(self.shell, RemoteShell):
            self.shell.close()

    def _write(self, file: str, text: str) -> None:
        assert self.account is not None
        if self.account.write(file, text) and file not in self.report.changed:
            self.report.changed.append(file)


def _contradiction(host: Host, key: PublicKey, other: PublicKey) -> Problem:
    return Problem(
        f"it knows another host key for {host}, {other.kind} {other.fingerprint}; {host} presents {key.fingerprint}",
        f"if {host} was installed anew, compare at its console and run again with --fingerprints {host}=SHA256:…, "
        "which replaces the old key everywhere",
    )
