"""Mutual logins: every host, and this machine, can log in to every host by key, with its host key pinned.

Each step takes all hosts as far as possible; a host that fails a step keeps its problem, and the others continue.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from hunyuan_vllm.cluster.account import AUTHORIZED_KEYS, KNOWN_HOSTS, read_account
from hunyuan_vllm.cluster.connections import Steps, connect, disconnect, read_host_key
from hunyuan_vllm.cluster.host_keys import PublicKey, Trust, authorize, keys_of, pin
from hunyuan_vllm.cluster.hosts import Host, HostError
from hunyuan_vllm.cluster.ssh import Credentials, LocalShell, last_line, load_script
from hunyuan_vllm.util.findings import Finding

# A server drops connections at random when many log in at once (MaxStartups in sshd_config): try again.
ATTEMPTS = 3
DROPPED = ("Connection closed", "Connection reset")
UNWRITABLE = re.compile("No space left on device|Disk quota exceeded|Read-only file system")


@dataclass(frozen=True)
class Pair:
    """One login without a password, from a host to a host. `tried` is false if an earlier problem prevents it."""

    source: str
    target: str
    problem: Finding | None = None
    tried: bool = True


@dataclass
class MutualLogin:
    """One run.

    Attributes:
        known_hosts: the host keys this machine knows, as text of such a file.
        fingerprints: host name → those of its keys that the operator gave.
        credentials: for the first login; later the key of this machine is enough.
        confirm: asks a person whether the keys of these hosts are theirs; None where nobody can answer.
        ask_password: asks for the password of these hosts; None where nobody can answer.
    """

    hosts: Sequence[Host]
    known_hosts: str
    fingerprints: Mapping[str, frozenset[str]]
    credentials: Credentials
    confirm: Callable[[Sequence[Host]], bool] | None
    ask_password: Callable[[Sequence[Host]], str] | None
    steps: Steps
    timeout: float
    _here: Host = field(default_factory=lambda: Host("this machine", local=True), init=False)

    def __post_init__(self) -> None:
        self._all = list(self.hosts)

    def run(self) -> tuple[list[Host], list[Pair]]:
        """All steps; the hosts, with this machine unless it is one of them, and the logins between them."""
        try:
            self._here.attempt(self._read_account)
            self._trust_host_keys()
            self._log_in()
            self.steps.each("SSH files", [host for host in self.hosts if host.shell], self._read_account)
            here = self._here.account
            if not any(here and host.account and host.account.identity == here.identity for host in self.hosts):
                self._all = [self._here, *self.hosts]
            usable = [host for host in self._all if host.account]
            self.steps.each("keys", usable, _make_key)
            self._distribute(usable)
            return self._all, self._verify()
        finally:
            disconnect(self.hosts)

    def _read_account(self, host: Host) -> None:
        if host.local:
            host.shell = LocalShell()
        assert host.shell is not None
        host.account = read_account(host.shell, self.timeout)
        host.hostname = host.account.hostname
        if not {"ssh", "ssh-keygen"} <= host.account.tools:
            host.problem("it has no SSH client to log in to others with", "install openssh-client there")

    def _trust_host_keys(self) -> None:
        self.steps.each(
            "host keys", self.hosts,
            lambda host: read_host_key(host, self.known_hosts, self.fingerprints, self.timeout),
        )  # fmt: skip
        unknown = [host for host in self.hosts if not host.trust and not host.problems]
        if not unknown:
            return
        confirmed = self.confirm is not None and self.confirm(unknown)
        for host in unknown:
            if confirmed:
                host.trust = Trust.CONFIRMED
                continue
            key = host.host_key
            assert key is not None
            host.problem(
                f"its host key is not known and was not confirmed: {key.kind} {key.fingerprint}",
                f"compare it at the host's console (ssh-keygen -lf /etc/ssh/ssh_host_{key.kind.lower()}_key.pub) and "
                f"give --fingerprints {host}={key.fingerprint}",
            )

    def _log_in(self) -> None:
        trusted = [host for host in self.hosts if host.trust]
        self.steps.each("logins", trusted, lambda host: connect(host, self.credentials, self.timeout))
        waiting = [host for host in trusted if host.password_needed]
        if not waiting:
            return
        if self.ask_password and (password := self.ask_password(waiting)):
            credentials = Credentials(self.credentials.keys, password)
            self.steps.each("logins with the password", waiting, lambda host: connect(host, credentials, self.timeout))
        for host in waiting:
            if error := host.password_needed:
                host.problem(error.text, error.remedy)

    def _distribute(self, usable: Sequence[Host]) -> None:
        lines = [host.public_line for host in self._all if host.public_line]
        keys = {host: host.host_key for host in self.hosts if host.trust and host.host_key}
        replaced = {host.known_hosts_name for host in keys if host.trust is Trust.GIVEN}

        def distribute(host: Host) -> None:
            assert host.account is not None
            if not host.local:
                _write(host, AUTHORIZED_KEYS, authorize(host.account.texts[AUTHORIZED_KEYS], lines))
            _pin_host_keys(host, keys, replaced)

        # A disk that was full for the key is full for the files, too: one problem is enough.
        writable = [host for host in usable if not any(UNWRITABLE.search(problem.text) for problem in host.problems)]
        self.steps.each("authorized_keys and known_hosts", writable, distribute)

    def _verify(self) -> list[Pair]:
        """Log in between all pairs that can; each source in its own order, so that no target meets all at once."""
        results: dict[tuple[Host, Host], Finding | None] = {}

        def verify_from(source: Host) -> None:
            start = sources.index(source)
            for target in targets[start:] + targets[:start]:
                results[source, target] = _verify_login(source, target, self.timeout)

        sources = [host for host in self._all if host.account and "ssh" in host.account.tools]
        targets = [host for host in self.hosts if host.account]
        self.steps.each("logins between the hosts", sources, verify_from)
        pairs = []
        for source in self._all:
            for target in self.hosts:
                if (source, target) in results:
                    pairs.append(Pair(source.name, target.name, results[source, target]))
                else:
                    at = target if target.account is None else source
                    problem = Finding(source.name, f"not tried: see {at.name}", "solve that first")
                    pairs.append(Pair(source.name, target.name, problem, tried=False))
        # Where logins fail because of a host's home directory, report it once, at that host.
        failed = {pair.target for pair in pairs if pair.tried and pair.problem}
        for host in self.hosts:
            if host.name in failed and host.account and (error := host.account.strict_modes_error()):
                host.problem(error.text, error.remedy)
        return pairs


def _make_key(host: Host) -> None:
    """Close the SSH files to others, and make a key if there is none."""
    assert host.account is not None
    host.changed += host.account.tighten()
    if "ssh-keygen" not in host.account.tools:
        return
    host.public_line, host.key_made = host.account.make_key()
    if host.key_made:
        host.changed.append(".ssh/id_ed25519")


def _pin_host_keys(host: Host, keys: Mapping[Host, PublicKey], replaced: set[str]) -> None:
    """Add host keys to known_hosts; one that contradicts an older entry is left out unless it is to be replaced."""
    assert host.account is not None
    text = host.account.texts[KNOWN_HOSTS]
    pinned = {}
    for target, key in keys.items():
        name = target.known_hosts_name
        known = keys_of(text, name)
        others = [other for other in known if other.type == key.type]
        if key in known or not others or name in replaced:
            pinned[name] = key
        else:
            host.problem(
                f"it knows another host key for {target}, {others[0].kind} {others[0].fingerprint}; {target} presents "
                f"{key.fingerprint}",
                f"if {target} was reinstalled, compare at its console and run again with --fingerprints "
                f"{target}=SHA256:…, which replaces the old key everywhere",
            )
    _write(host, KNOWN_HOSTS, pin(text, pinned, replaced))


def _write(host: Host, file: str, text: str) -> None:
    assert host.account is not None
    if host.account.write(file, text) and file not in host.changed:
        host.changed.append(file)


def _verify_login(source: Host, target: Host, timeout: float) -> Finding | None:
    """Log in from one host to another with its own ssh; None if that worked."""
    assert source.shell is not None
    variables = {"address": target.name, "port": str(target.port), "user": target.user}
    try:
        for attempt in range(ATTEMPTS):
            seconds = str(max(1, round(timeout)))
            done = source.shell.run(load_script("verify"), 4 * timeout, **variables, seconds=seconds)
            if done.status == 0:
                return None
            if not any(sign in done.errors for sign in DROPPED):
                break
            time.sleep(0.5 + attempt)
        error = HostError(
            f"ssh to {target} failed: {last_line(done.errors) or 'no reason given'}",
            f"run there: ssh -v -p {target.port} {target.user}@{target.name}; {target}'s sshd log names its reasons",
        )
    except HostError as caught:
        error = caught
    return Finding(source.name, error.text, error.remedy)
