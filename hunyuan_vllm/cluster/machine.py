"""One host as the set-up of logins treats it"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from hunyuan_vllm.cluster.host_keys import Fingerprints, PublicKey, admit, judge, keys_of, pin
from hunyuan_vllm.cluster.hosts import Host
from hunyuan_vllm.cluster.login_report import HostReport, Pair
from hunyuan_vllm.cluster.problems import HostError, Problem, file_problem, ssh_problem
from hunyuan_vllm.cluster.ssh import (
    Credentials,
    LocalShell,
    PasswordNeeded,
    RemoteShell,
    Shell,
    fetch_host_key,
    load_script,
    log_in,
)

# A server drops connections at random when many log in at once (MaxStartups in sshd_config): try again.
ATTEMPTS = 3
DROPPED = ("Connection closed", "Connection reset")


def prove(shell: Shell, target: Host, timeout: float) -> Problem | None:
    """Log in to `target` from where `shell` runs; None if that worked.

    Raises:
        HostError: nothing could be run there.
    """
    names = {"address": target.address, "port": str(target.port), "user": target.user}
    for attempt in range(ATTEMPTS):
        done = shell.run(load_script("prove"), 4 * timeout, **names, seconds=str(max(1, round(timeout))))
        if done.status == 0:
            return None
        if not any(sign in done.errors for sign in DROPPED):
            break
        time.sleep(0.5 + attempt)
    return ssh_problem(done.errors, target)


AUTHORIZED_KEYS = ".ssh/authorized_keys"
KNOWN_HOSTS = ".ssh/known_hosts"
GROUP_OR_OTHERS = 0o077
WRITABLE_BY_OTHERS = 0o022


@dataclass
class Account:
    """One user on one machine, and the shell that acts as that user.

    Attributes:
        account: tells whether two names lead to the same home on the same running system.
        texts: file (below the home directory) → its text, of AUTHORIZED_KEYS and KNOWN_HOSTS.
        modes: file → access rights; "." is the home directory.
    """

    shell: Shell
    timeout: float
    user: str
    uid: int
    hostname: str
    home: str
    account: str
    tools: set[str] = field(default_factory=set)
    texts: dict[str, str] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    owners: dict[str, int] = field(default_factory=dict)
    public: str = ""

    def tighten(self) -> list[str]:
        """Close .ssh (700) and its files (600) to others; the names of those that were open.

        Raises:
            HostError: it could not be done.
        """
        open_files = [file for file, mode in self.modes.items() if file != "." and mode & GROUP_OR_OTHERS]
        if open_files:
            self._run("tighten", "closing its SSH files to others", files=" ".join(open_files))
        return open_files

    def make_key(self) -> tuple[str, bool]:
        """The account's ed25519 key: its public line, and whether it was made now.

        Raises:
            HostError: there is none and none can be made, or the one there is cannot be used without a person.
        """
        if self.public and ".ssh/id_ed25519" not in self.modes:
            raise self._foreign_public_key()
        out = self._run("key", "making its key")
        made = out.startswith("made\n")
        line = out.removeprefix("made\n").strip()
        key = PublicKey.parse(line.split())
        if key is None:
            raise HostError(f"{self.home}/.ssh/id_ed25519 is not a key", "move it away, and a new one is made")
        if self.public and self.public.split()[:2] != line.split()[:2]:
            raise self._foreign_public_key()
        # ssh-keygen gives the comment of the private half, which names the user and the host.
        return line, made

    def write(self, file: str, text: str) -> bool:
        """Make `text` the file's text; whether that changed anything.

        Raises:
            HostError: it could not be done; the file is as it was.
        """
        if self.texts.get(file, "") == text:
            return False
        content = base64.b64encode(text.encode(errors="surrogateescape")).decode()
        self._run("write", f"writing {file}", file=file, content=content)
        self.texts[file] = text
        return True

    def strict_modes_problem(self) -> Problem | None:
        """Why sshd would ignore this account's keys, as far as its home directory is the reason."""
        mode, owner = self.modes.get(".", 0), self.owners.get(".", 0)
        if mode & WRITABLE_BY_OTHERS:
            return Problem(
                f"{self.home} is writable by others (mode {mode:o}), so sshd ignores the keys in it",
                f"chmod go-w {self.home}",
            )
        if owner not in (0, self.uid):
            return Problem(
                f"{self.home} does not belong to {self.user}, so sshd ignores the keys in it",
                f"chown {self.user} {self.home}",
            )
        return None

    def _foreign_public_key(self) -> HostError:
        return HostError(
            f"{self.home}/.ssh/id_ed25519.pub does not belong to the private key beside it",
            "move it away; the private key is enough, and where there is none, both are made",
        )

    def _run(self, script: str, doing: str, **variables: str) -> str:
        done = self.shell.run(load_script(script), self.timeout, **variables)
        if done.status != 0:
            problem = file_problem(done.errors, self.user, self.home, doing)
            raise HostError(problem.what, problem.remedy)
        return done.out.decode(errors="replace")


def look(shell: Shell, timeout: float) -> Account:
    """What the account that `shell` acts for has; changes nothing.

    Raises:
        HostError: it cannot be read.
    """
    done = shell.run(load_script("look"), timeout)
    pairs = [line.partition(" ")[::2] for line in done.out.decode(errors="surrogateescape").splitlines()]
    facts = dict(pairs)
    if done.status != 0:
        user, home = facts.get("user", "the user"), facts.get("home", "~")
        problem = file_problem(done.errors, user, home, "looking at its SSH files")
        raise HostError(problem.what, problem.remedy)
    account = Account(
        shell, timeout, facts["user"], int(facts["uid"]), facts["hostname"], facts["home"], facts["account"]
    )
    account.tools = {value for name, value in pairs if name == "tool"}
    for words in (value.split(" ", 2) for name, value in pairs if name == "mode"):
        account.modes[words[2]], account.owners[words[2]] = int(words[0], 8), int(words[1])
    for file in (AUTHORIZED_KEYS, KNOWN_HOSTS):
        account.texts[file] = _text(facts.get(file.removeprefix(".ssh/"), ""))
    account.public = _text(facts.get("public", "")).strip()
    return account


def _text(content: str) -> str:
    return base64.b64decode(content).decode(errors="surrogateescape")


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
