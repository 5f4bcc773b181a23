"""What can go wrong with a host, each with its cause in a line and its remedy."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from hunyuan_vllm.cluster.hosts import Host

__all__ = ["HostError", "Problem", "connection_problem", "file_problem", "last_line", "ssh_problem"]

LONGEST_QUOTE = 200


@dataclass(frozen=True)
class Problem:
    """What is wrong, and what to do about it."""

    what: str
    remedy: str


class HostError(Exception):
    """One host fails; the others go on."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.problem = Problem(what, remedy)


def last_line(text: str) -> str:
    """The last line that says something, fit for a terminal: a host may send anything."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    quote = "".join(character for character in (lines[-1] if lines else "") if character.isprintable())
    return quote if len(quote) <= LONGEST_QUOTE else quote[:LONGEST_QUOTE] + "…"


def connection_problem(error: OSError, host: Host, timeout: float) -> Problem:
    """Why no TCP connection to `host` came about."""
    where = f"{host.address} port {host.port}"
    if isinstance(error, socket.gaierror):
        return Problem(f"the name {host.address} is not known here", "give its IP address, or enter it in /etc/hosts")
    if isinstance(error, TimeoutError) or error.errno == errno.ETIMEDOUT:
        return Problem(
            f"no answer from {where} within {timeout:g} s",
            "check the address, that the host is up, and that no firewall drops the port; --timeout waits longer",
        )
    if error.errno == errno.ECONNREFUSED:
        return Problem(f"nothing listens on {where}", "start sshd there, or give the port it listens on with --port")
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        return Problem(f"{where} is unreachable: {error.strerror}", "check the address and that the host is up")
    return Problem(f"no connection to {where}: {error.strerror or error}", "check the address and the network")


# (what the tools print in the C locale, what it means, what to do); the first that occurs is taken.
Causes = Iterable[tuple[str, str, str]]

FILES: Causes = (
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
        "{home}/.ssh/id_ed25519 has a passphrase, which no one is there to type",
        "take it off (ssh-keygen -p -N '' -f {home}/.ssh/id_ed25519), or move the key away to have one made",
    ),
    (
        "not found",
        "a basic command is missing: {line}",
        "install the packages coreutils and openssh-client",
    ),
)

SSH: Causes = (
    (
        "IDENTIFICATION HAS CHANGED",
        "it knows another host key for {target}",
        "compare {target}'s fingerprint at its console and run again with --fingerprints {target}=SHA256:…",
    ),
    (
        "host key is known for",
        "it knows no host key of {target}",
        "see what kept its known_hosts from being written, and run again",
    ),
    (
        "Host key verification failed",
        "its host key check refused {target}",
        "look for {name} in its known_hosts and in /etc/ssh/ssh_known_hosts",
    ),
    (
        "Permission denied (",
        "{target} refuses its key",
        "on {target}, let {user} in by ~/.ssh/authorized_keys (sshd_config: PubkeyAuthentication, AuthorizedKeysFile, "
        "AllowUsers; access rights of the home directory); its sshd log names the reason",
    ),
    ("Could not resolve hostname", "it does not know the name {target}", "enter it in /etc/hosts there, or use IPs"),
    ("Connection refused", "{target} refuses its connection", "let it through to port {port} of {target} (firewall)"),
    ("timed out", "no answer from {target} in time", "let it through to port {port} of {target} (firewall, routes)"),
    ("No route to host", "it has no route to {target}", "check routes and firewalls between the two"),
    ("Network is unreachable", "it has no route to {target}", "check routes and address families of the two"),
    ("Bad owner or permissions on", "its SSH configuration is not used: {line}", "chmod 600 that file there"),
    (
        "Connection closed",
        "{target} closed the connection before login",
        "see {target}'s sshd log (MaxStartups, fail2ban, hosts.deny), or use fewer --jobs",
    ),
    (
        "Connection reset",
        "{target} closed the connection before login",
        "see {target}'s sshd log (MaxStartups, fail2ban, hosts.deny), or use fewer --jobs",
    ),
)


def file_problem(errors: str, user: str, home: str, doing: str) -> Problem:
    """Why a command about files failed, from what it printed."""
    fallback = Problem(f"{doing} failed: {last_line(errors) or 'no reason given'}", "run it by hand there")
    return _find(FILES, errors, fallback, user=user, home=home)


def ssh_problem(errors: str, target: Host) -> Problem:
    """Why `ssh` on some host did not get into `target`, from what it printed there."""
    fallback = Problem(
        f"ssh to {target} failed: {last_line(errors) or 'no reason given'}",
        f"run there: ssh -v -p {target.port} {target.user}@{target.address}",
    )
    names = {"target": target.address, "name": target.known_hosts_name, "user": target.user, "port": str(target.port)}
    return _find(SSH, errors, fallback, **names)


def _find(causes: Causes, errors: str, fallback: Problem, **names: str) -> Problem:
    for sign, what, remedy in causes:
        if sign in errors:
            names = {**names, "line": last_line(errors)}
            return Problem(what.format(**names), remedy.format(**names))
    return fallback
