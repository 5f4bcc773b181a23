"""The SSH files of one user on one host: read, closed to others, written"""

import base64
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

    def tighten(self) -> list[str]:
        """Close .ssh (700) and its files (600) to others; returns the names of those that were open."""
        open_files = [file for file, mode in self.modes.items() if file != "." and mode & GROUP_OR_OTHERS]
        if open_files:
            self._run("tighten", "closing its SSH files to others", files=" ".join(open_files))
        return open_files

    def make_key(self) -> tuple[str, bool]:
        """The account's ed25519 key: its public line, and whether it was made now."""
        out = self._run("key", "making its key")
        made = out.startswith("made\n")
        line = out.removeprefix("made\n").strip()
        key = PublicKey.parse(line.split())
        if key is None:
            raise HostError(f"{self.home}/.ssh/id_ed25519 is not a key", "move it away: a new one is then made")
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

    def _run(self, script: str, doing: str, **variables: str) -> str:
        done = self.shell.run(load_script(script), self.timeout, **variables)
        if done.status != 0:
            raise _file_error(done.errors, self.home, doing)
        return done.out.decode(errors="replace")


def read_account(shell: Shell, timeout: float) -> Account:
    """The SSH files of the account that `shell` acts for; changes nothing."""
    done = shell.run(load_script("account"), timeout)
    pairs = [line.partition(" ")[::2] for line in done.out.decode(errors="surrogateescape").splitlines()]
    facts = dict(pairs)
    if done.status != 0:
        raise _file_error(done.errors, facts.get("home", "~"), "reading its SSH files")
    account = Account(
        shell, timeout, facts["user"], int(facts["uid"]), facts["hostname"], facts["home"], facts["account"]
    )
    account.tools = {value for name, value in pairs if name == "tool"}
    for words in (value.split(" ", 2) for name, value in pairs if name == "mode"):
        account.modes[words[2]], account.owners[words[2]] = int(words[0], 8), int(words[1])
    for file in (AUTHORIZED_KEYS, KNOWN_HOSTS):
        content = base64.b64decode(facts.get(file.removeprefix(".ssh/"), ""))
        account.texts[file] = content.decode(errors="surrogateescape")
    return account


def _file_error(errors: str, home: str, doing: str) -> HostError:
    """The tools' own last line names the cause: no space left, read-only, permission denied, a passphrase."""
    return HostError(
        f"{doing} failed: {last_line(errors) or 'no reason given'}",
        f"solve that in {home}/.ssh (free space, permissions, a key without a passphrase), and run the command again",
    )
