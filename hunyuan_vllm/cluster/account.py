"""An account's SSH files, on any host: what is there, a key where none is, and files replaced whole."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field

from hunyuan_vllm.cluster.problems import HostError, Problem, file_problem
from hunyuan_vllm.cluster.public_key import PublicKey
from hunyuan_vllm.cluster.shell import Shell, load_script

__all__ = ["AUTHORIZED_KEYS", "KNOWN_HOSTS", "Account", "look"]

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
