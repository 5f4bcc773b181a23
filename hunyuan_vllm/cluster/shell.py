"""A shell on a host, or on this machine: runs scripts whole or not at all, and gives back what they printed."""

from __future__ import annotations

import os
import pwd
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import paramiko

from hunyuan_vllm.cluster.problems import HostError, last_line

__all__ = ["LocalShell", "Output", "RemoteShell", "Shell", "compose", "load_script"]

# Before it stands what start-up files such as .bashrc print.
MARK = b"--hunyuan-vllm--\n"


@dataclass(frozen=True)
class Output:
    """What a script printed, and its exit status."""

    out: bytes
    errors: str
    status: int


class Shell(Protocol):
    """Where scripts run."""

    def run(self, script: str, timeout: float, **variables: str) -> Output:
        """Run a POSIX shell script with these variables set.

        Raises:
            HostError: it did not run, or not to its end within `timeout` seconds.
        """


def load_script(name: str) -> str:
    """A script from the folder `remote`."""
    return Path(__file__).with_name("remote").joinpath(f"{name}.sh").read_text()


def compose(script: str, variables: Mapping[str, str]) -> bytes:
    """What goes to the shell's standard input, so that nothing is in anyone's arguments.

    The shell reads the braces to their end before it runs anything in them: of a script that arrives only in part,
    because the connection broke, nothing runs.
    """
    # Unset first: a variable that was exported would stay so, and be in the environment of all that the script runs.
    settings = "".join(f"unset {name}; {name}={shlex.quote(value)}\n" for name, value in variables.items())
    mark = MARK.decode().strip()
    return f"{{\nLC_ALL=C\nexport LC_ALL\nprintf '%s\\n' {mark}\n{settings}{script}\n}}\n".encode()


def _after_mark(out: bytes, errors: bytes, status: int) -> Output:
    before, mark, after = out.partition(MARK)
    text = errors.decode(errors="replace")
    if not mark:
        said = last_line(text) or last_line(before.decode(errors="replace")) or f"status {status}"
        raise HostError(
            f"the account runs no commands: {said}",
            "give it a POSIX login shell (usermod --shell /bin/bash), no forced command, no expired password",
        )
    return Output(after, text, status)


class LocalShell:
    """This machine, as the user who runs this program."""

    def __init__(self) -> None:
        # ssh looks into the home that the system has for the user, whatever HOME says.
        self._environ = {**os.environ, "HOME": pwd.getpwuid(os.geteuid()).pw_dir}

    def run(self, script: str, timeout: float, **variables: str) -> Output:
        try:
            done = subprocess.run(
                ["sh", "-s"], input=compose(script, variables), env=self._environ, capture_output=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            raise HostError(f"a command took longer than {timeout:g} s", "try again with a longer --timeout") from None
        return _after_mark(done.stdout, done.stderr, done.returncode)


class RemoteShell:
    """A host that is logged in to."""

    def __init__(self, transport: paramiko.Transport) -> None:
        self._transport = transport

    def run(self, script: str, timeout: float, **variables: str) -> Output:
        try:
            with self._transport.open_session(timeout=timeout) as channel:
                channel.settimeout(timeout)
                channel.exec_command("sh -s")
                channel.sendall(compose(script, variables))
                channel.shutdown_write()
                out = channel.makefile("rb").read()
                errors = channel.makefile_stderr("rb").read()
                return _after_mark(out, errors, channel.recv_exit_status())
        except TimeoutError:
            raise HostError(f"a command took longer than {timeout:g} s", "try again with a longer --timeout") from None
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise HostError(
                f"the connection broke: {last_line(str(error)) or type(error).__name__}", "run again"
            ) from None

    @property
    def address(self) -> str:
        """The IP address that the host was reached at."""
        address: str = self._transport.getpeername()[0]
        return address

    def close(self) -> None:
        self._transport.close()
