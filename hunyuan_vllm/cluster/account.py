"""The SSH files of one user on one host: read, closed to others, written"""

import base64
from collections.abc import Iterable
from dataclasses import dataclass, field

from hunyuan_vllm.cluster.host_keys import PublicKey
from hunyuan_vllm.cluster.hosts import HostError
from hunyuan_vllm.cluster.ssh import Shell, last_line, load_script

AUTHORIZED_KEYS = ".ssh/authorized_keys"
KNOWN_HOSTS = ".ssh/known_hosts"
GROUP_OR_OTHERS = 0o077
WRITABLE_BY_OTHERS = 0o022


@dataclass
class Account:
    """One user on one host: the SSH files, and a shell that acts as that user.

    Attributes:
        identity: the same for two names that lead to the same home on the same running system.
        texts: file (below the home directory) → its text, of AUTHORIZED_KEYS and KNOWN_HOSTS.
        modes: file → access rights; "." is the home directory.
    """

    shell: Shell
    timeout: float
    user: str
    uid: int
    hostname: str
    home: str
    identity: str
    tools: set[str] = field(default_factory=set)
    texts: dict[str, str] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    owners: dict[str, int] = field(default_factory=dict)
    public: str = ""

    def tighten(self) -> list[str]:
        """Close .ssh (700) and its files (600) to others; returns the names of those that were open."""
        open_files = [file for file, mode in self.modes.items() if file != "." and mode & GROUP_OR_OTHERS]
        if open_files:
            self._run("tighten", "closing its SSH files to others", files=" ".join(open_files))
        return open_files

    def make_key(self) -> tuple[str, bool]:
        """The account's ed25519 key: its public line, and whether it was made now."""
        if self.public and ".ssh/id_ed25519" not in self.modes:
            raise self._foreign_public_key()
        out = self._run("key", "making its key")
        made = out.startswith("made\n")
        line = out.removeprefix("made\n").strip()
        key = PublicKey.parse(line.split())
        if key is None:
            raise HostError(f"{self.home}/.ssh/id_ed25519 is not a key", "move it away: a new one is then made")
        if self.public and self.public.split()[:2] != line.split()[:2]:
            raise self._foreign_public_key()
        # ssh-keygen gives the comment of the private half, which names the user and the host.
        return line, made

    def write(self, file: str, text: str) -> bool:
        """Write `text` to the file; whether that changed anything."""
        if self.texts.get(file, "") == text:
            return False
        content = base64.b64encode(text.encode(errors="surrogateescape")).decode()
        self._run("write", f"writing {file}", file=file, content=content)
        self.texts[file] = text
        return True

    def strict_modes_error(self) -> HostError | None:
        """Why sshd would ignore this account's keys because of its home directory."""
        mode, owner = self.modes.get(".", 0), self.owners.get(".", 0)
        if mode & WRITABLE_BY_OTHERS:
            return HostError(
                f"{self.home} is writable by others (mode {mode:o}), so sshd ignores the keys in it",
                f"chmod go-w {self.home}",
            )
        if owner not in (0, self.uid):
            return HostError(
                f"{self.home} does not belong to {self.user}, so sshd ignores the keys in it",
                f"chown {self.user} {self.home}",
            )
        return None

    def _foreign_public_key(self) -> HostError:
        return HostError(
            f"{self.home}/.ssh/id_ed25519.pub does not belong to the private key beside it",
            "move it away: the private key is enough, and both are made if there is none",
        )

    def _run(self, script: str, doing: str, **variables: str) -> str:
        done = self.shell.run(load_script(script), self.timeout, **variables)
        if done.status != 0:
            raise _file_error(done.errors, self.user, self.home, doing)
        return done.out.decode(errors="replace")


def read_account(shell: Shell, timeout: float) -> Account:
    """The SSH files of the account that `shell` acts for; changes nothing."""
    done = shell.run(load_script("account"), timeout)
    pairs = [line.partition(" ")[::2] for line in done.out.decode(errors="surrogateescape").splitlines()]
    facts = dict(pairs)
    if done.status != 0:
        user, home = facts.get("user", "the user"), facts.get("home", "~")
        raise _file_error(done.errors, user, home, "reading its SSH files")
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


# (what the tools print in the C locale, what it means, what to do); the first that occurs is used.
Causes = Iterable[tuple[str, str, str]]

CAUSES: Causes = (
    ("No space left on device", "the disk that holds {home} is full", "free space there: df -h {home}"),
    ("Disk quota exceeded", "the disk quota of {user} is used up", "free space in {home}, or raise the quota"),
    (
        "Read-only file system",
        "{home} is on a read-only file system",
        "mount it read-write: findmnt -T {home} names the mount",
    ),
    (
        "Permission denied",
        "{user} may not read or write {home}/.ssh",
        "give it back to its user: chown -R {user} {home}/.ssh && chmod -R u+rwX {home}/.ssh",
    ),
    (
        "Operation not permitted",
        "the system refuses changes in {home}/.ssh",
        "look for immutable files (lsattr -dR {home}/.ssh) and run chattr -i on them",
    ),
    (
        "incorrect passphrase",
        "{home}/.ssh/id_ed25519 has a passphrase, which cannot be entered when ranks start",
        "remove it (ssh-keygen -p -N '' -f {home}/.ssh/id_ed25519), or move the key away to have one made",
    ),
    (
        "not found",
        "a basic command is missing: {line}",
        "install the packages coreutils and openssh-client",
    ),
)


def find_cause(causes: Causes, errors: str, **names: str) -> HostError | None:
    """What the output of a failed command means."""
    for sign, text, remedy in causes:
        if sign in errors:
            names = {**names, "line": last_line(errors)}
            return HostError(text.format(**names), remedy.format(**names))
    return None


def _file_error(errors: str, user: str, home: str, doing: str) -> HostError:
    text = f"{doing} failed: {last_line(errors) or 'no reason given'}"
    return find_cause(CAUSES, errors, user=user, home=home) or HostError(text, "run it there in a shell")
