"""SSH connections: a host's key from the key exchange alone, and logins that insist on a key known before."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import paramiko

from hunyuan_vllm.cluster.hosts import Host
from hunyuan_vllm.cluster.problems import HostError, connection_problem, last_line
from hunyuan_vllm.cluster.public_key import PublicKey

__all__ = ["Credentials", "PasswordNeeded", "fetch_host_key", "log_in"]

# Its transports log tracebacks of what is raised here anyway.
logging.getLogger("paramiko").addHandler(logging.NullHandler())
logging.getLogger("paramiko").propagate = False


@dataclass(frozen=True)
class Credentials:
    """What to log in with: keys first, then the password."""

    keys: Sequence[paramiko.PKey] = ()
    password: str | None = field(default=None, repr=False)


class PasswordNeeded(HostError):
    """No key let us in, and there is no password to try, but one would be taken."""


def fetch_host_key(host: Host, known: Iterable[PublicKey], timeout: float) -> PublicKey:
    """The key with which `host` signs a key exchange; no login is tried.

    Args:
        known: keys known for it: their types are asked for first, so that they can be compared at all.

    Raises:
        HostError: it is not reached, or is no SSH server.
    """
    with _handshake(host, [key.type for key in known], timeout) as transport:
        key = _presented(transport)
        transport.close()
        return key


def log_in(host: Host, pinned: PublicKey, credentials: Credentials, timeout: float) -> paramiko.Transport:
    """A connection that is logged in to `host`; nothing is sent to a host that presents another key than `pinned`.

    Raises:
        PasswordNeeded: see there.
        HostError: it is not reached, presents another key, or refuses the credentials.
    """
    with _handshake(host, [pinned.type], timeout) as transport:
        presented = _presented(transport)
        if presented != pinned:
            raise HostError(
                f"its host key changed while this ran: {presented.kind} {presented.fingerprint}",
                "something answers in its place at times: find out what before you log in",
            )
        _authenticate(transport, host, credentials)
        transport.set_keepalive(15)
        return transport


@contextmanager
def _handshake(host: Host, key_types: Sequence[str], timeout: float) -> Iterator[paramiko.Transport]:
    """A connection after the key exchange; closed if the block raises, whose errors become the host's."""
    try:
        connected = socket.create_connection((host.address, host.port), timeout)
    except OSError as error:
        problem = connection_problem(error, host, timeout)
        raise HostError(problem.what, problem.remedy) from None
    transport = paramiko.Transport(connected)
    try:
        _prefer(transport, key_types)
        transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = timeout
        transport.channel_timeout = timeout
        transport.start_client(timeout=2 * timeout)
        yield transport
    except HostError:
        transport.close()
        raise
    except (paramiko.SSHException, EOFError, OSError) as error:
        transport.close()
        reason = last_line(str(error)) or "it closed the connection"
        if "banner" in reason:
            reason = f"something listens there, but says nothing within {timeout:g} s"
        raise HostError(
            f"no SSH connection to {host.address} port {host.port}: {reason}",
            "check that an SSH server listens there and is not overloaded; --timeout waits longer",
        ) from None
    except BaseException:
        transport.close()
        raise


def _prefer(transport: paramiko.Transport, key_types: Sequence[str]) -> None:
    """Ask for host keys of these types before others."""
    options = transport.get_security_options()
    first = {"rsa-sha2-512", "rsa-sha2-256"} if "ssh-rsa" in key_types else set()
    first.update(key_types)
    options.key_types = sorted(options.key_types, key=lambda name: name not in first)


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
    account = f"{host.user}@{host.address}"
    if not takes_passwords:
        return HostError(
            f"{account} takes no password, and none of the keys at hand",
            "give a key that it takes with --identity, or allow PasswordAuthentication in its sshd_config for this run",
        )
    if credentials.password is None:
        return PasswordNeeded(
            f"{account} takes none of the keys at hand, and there is no password",
            "give one (--password-file, HUNYUAN_SSH_PASSWORD, or a terminal to ask at), or a key with --identity",
        )
    if methods:
        return HostError(
            f"{account} wants more than the password: {', '.join(methods)}", "give a key that it takes with --identity"
        )
    return HostError(
        f"{account} refuses the password",
        "check password and --user; for root, sshd_config there may have PermitRootLogin prohibit-password",
    )
