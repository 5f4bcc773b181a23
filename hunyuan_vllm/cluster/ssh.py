"""SSH connections to hosts, and commands over them"""

import errno
import logging
import os
import pwd
import shlex
import socket
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import paramiko

from hunyuan_vllm.cluster.host_keys import PublicKey
from hunyuan_vllm.cluster.hosts import Host, HostError

# Its transports log tracebacks of what is raised here anyway.
logging.getLogger("paramiko").addHandler(logging.NullHandler())
logging.getLogger("paramiko").propagate = False

LONGEST_QUOTE = 200  # characters


@dataclass(frozen=True)
class Credentials:
    """What to log in with: keys first, then the password."""

    keys: Sequence[paramiko.PKey] = ()
    password: str | None = field(default=None, repr=False)


class PasswordNeeded(HostError):
    """No key was accepted and no password was given, but the host would take one."""


def fetch_host_key(host: Host, known: Iterable[PublicKey], timeout: float) -> PublicKey:
    """The key with which `host` signs a key exchange; there is no login.

    Args:
        known: keys known for it: their types are requested first, so that they can be compared.
    """
    with _handshake(host, [key.type for key in known], timeout) as transport:
        key = _presented(transport)
        transport.close()
        return key


def log_in(host: Host, pinned: PublicKey, credentials: Credentials, timeout: float) -> paramiko.Transport:
    """A connection that is logged in to `host`; nothing is sent to a host that presents another key than `pinned`."""
    with _handshake(host, [pinned.type], timeout) as transport:
        presented = _presented(transport)
        if presented != pinned:
            raise HostError(
                f"its host key changed while this ran: {presented.kind} {presented.fingerprint}",
                "sometimes another machine answers in its place: find it before you log in",
            )
        _authenticate(transport, host, credentials)
        transport.set_keepalive(15)
        return transport


@contextmanager
def _handshake(host: Host, key_types: Sequence[str], timeout: float) -> Iterator[paramiko.Transport]:
    """A connection after the key exchange; closed if the block raises, whose errors become the host's."""
    try:
        connected = socket.create_connection((host.name, host.port), timeout)
    except OSError as error:
        raise _unreached(error, host, timeout) from None
    transport = paramiko.Transport(connected)
    try:
        options = transport.get_security_options()
        first = {*key_types, *(("rsa-sha2-512", "rsa-sha2-256") if "ssh-rsa" in key_types else ())}
        options.key_types = sorted(options.key_types, key=lambda name: name not in first)  # asked for before others
        transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = timeout
        transport.channel_timeout = timeout
        transport.start_client(timeout=2 * timeout)
        yield transport
    except (paramiko.SSHException, EOFError, OSError) as error:
        transport.close()
        reason = last_line(str(error)) or "it closed the connection"
        if "banner" in reason:
            reason = f"something listens there, but sends nothing within {timeout:g} s"
        raise HostError(
            f"no SSH connection to {host.name} port {host.port}: {reason}",
            "check that an SSH server listens there and is not overloaded; --timeout waits longer",
        ) from None
    except BaseException:
        transport.close()
        raise


def _unreached(error: OSError, host: Host, timeout: float) -> HostError:
    """Why there is no TCP connection to `host`."""
    where = f"{host.name} port {host.port}"
    if isinstance(error, socket.gaierror):
        return HostError(f"the name {host.name} is not known here", "give its IP address, or add it to /etc/hosts")
    if isinstance(error, TimeoutError) or error.errno == errno.ETIMEDOUT:
        return HostError(
            f"no answer from {where} within {timeout:g} s",
            "check the address, that the host is up, and that no firewall drops the port; --timeout waits longer",
        )
    if error.errno == errno.ECONNREFUSED:
        return HostError(f"nothing listens on {where}", "start sshd there, or give the port it listens on with --port")
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        return HostError(f"{where} is unreachable: {error.strerror}", "check the address and that the host is up")
    return HostError(f"no connection to {where}: {error.strerror or error}", "check the address and the network")


def _presented(transport: paramiko.Transport) -> PublicKey:
    key = transport.get_remote_server_key()
    return PublicKey(key.get_name(), key.get_base64())


def _authenticate(transport: paramiko.Transport, host: Host, credentials: Credentials) -> None:
    """Log in by the first of the credentials that the host takes."""
    methods = _methods_after(transport, partial(transport.auth_none, host.user))
    for key in credentials.keys if "publickey" in methods else ():
        methods = _methods_after(transport, partial(transport.auth_publickey, host.user, key)) or methods
        if transport.is_authenticated():
            return
    takes_passwords = bool({"password", "keyboard-interactive"} & set(methods))
    if credentials.password is not None and takes_passwords:
        methods = _methods_after(transport, partial(transport.auth_password, host.user, credentials.password))
    if not transport.is_authenticated():
        raise _refusal(host, credentials, methods, takes_passwords)


def _methods_after(transport: paramiko.Transport, attempt: Callable[[], list[str]]) -> list[str]:
    """The methods that the host would take after one was tried; empty if it does not say."""
    try:
        return attempt()
    except paramiko.BadAuthenticationType as error:
        return error.allowed_types
    except paramiko.AuthenticationException as error:
        if not transport.is_active() or "timeout" in str(error).lower():
            raise
        return []


def _refusal(host: Host, credentials: Credentials, methods: list[str], takes_passwords: bool) -> HostError:
    account = f"{host.user}@{host.name}"
    if not takes_passwords:
        return HostError(
            f"{account} accepts no password and none of the available keys",
            "give a key that it accepts with --identity, or allow PasswordAuthentication in its sshd_config meanwhile",
        )
    if credentials.password is None:
        return PasswordNeeded(
            f"{account} accepts none of the available keys, and no password was given",
            "give one (--password-file, HUNYUAN_SSH_PASSWORD, or a terminal to ask at), or a key with --identity",
        )
    if methods:
        return HostError(
            f"{account} requires more than the password: {', '.join(methods)}",
            "give a key that it accepts with --identity",
        )
    return HostError(
        f"{account} refuses the password",
        "check password and --user; for root, sshd_config there may have PermitRootLogin prohibit-password",
    )


def last_line(text: str) -> str:
    """The last line that is not empty, made safe for a terminal: a host may send anything."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    quote = "".join(character for character in (lines[-1] if lines else "") if character.isprintable())
    return quote if len(quote) <= LONGEST_QUOTE else quote[:LONGEST_QUOTE] + "…"


# Start-up files such as .bashrc print before it.
MARK = b"--hunyuan-vllm--\n"


@dataclass(frozen=True)
class Output:
    """What a script printed, and its exit status."""

    out: bytes
    errors: str
    status: int


def load_script(name: str) -> str:
    """A script from the directory `remote`."""
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


def _timed_out(timeout: float) -> HostError:
    return HostError(f"a command took longer than {timeout:g} s", "try again with a longer --timeout")


class LocalShell:
    """This machine, as the user who runs this program."""

    def __init__(self) -> None:
        # ssh looks into the home that the system has for the user, whatever HOME says.
        self._environ = {**os.environ, "HOME": pwd.getpwuid(os.geteuid()).pw_dir}

    def run(self, script: str, timeout: float, **variables: str) -> Output:
        """Run a POSIX shell script with these variables set."""
        try:
            done = subprocess.run(
                ["sh", "-s"], input=compose(script, variables), env=self._environ, capture_output=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            raise _timed_out(timeout) from None
        return _after_mark(done.stdout, done.stderr, done.returncode)


class RemoteShell:
    """The account that a connection is logged in to."""

    def __init__(self, transport: paramiko.Transport) -> None:
        self._transport = transport
        self.close = transport.close
        self.address: str = transport.getpeername()[0]  # the IP address that the host was reached at

    def run(self, script: str, timeout: float, **variables: str) -> Output:
        """Run a POSIX shell script with these variables set."""
        try:
            with self._transport.open_session(timeout=timeout) as channel:
                channel.settimeout(timeout)
                channel.exec_command("sh -s")
                try:
                    channel.sendall(compose(script, variables))
                    channel.shutdown_write()
                except TimeoutError:
                    raise
                except OSError:  # an account without a shell ends before it reads; what it says is read below
                    if not self._transport.is_active():
                        raise
                out = channel.makefile("rb").read()
                errors = channel.makefile_stderr("rb").read()
                return _after_mark(out, errors, channel.recv_exit_status())
        except TimeoutError:
            raise _timed_out(timeout) from None
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise HostError(
                f"the connection broke: {last_line(str(error)) or type(error).__name__}", "run again"
            ) from None


Shell = LocalShell | RemoteShell
