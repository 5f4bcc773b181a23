"""Whether the key a host presents is its own: known before, or vouched for, or for a person to say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from hunyuan_vllm.cluster.hosts import Host, normalise_address
from hunyuan_vllm.cluster.known_hosts import keys_of, revoked_keys_of
from hunyuan_vllm.cluster.problems import HostError
from hunyuan_vllm.cluster.public_key import FINGERPRINT, PublicKey
from hunyuan_vllm.errors import UserError

__all__ = ["Fingerprints", "Trust", "judge"]


class Trust(StrEnum):
    """Why a host key is believed."""

    KNOWN = "known before"
    GIVEN = "fingerprint given"
    CONFIRMED = "confirmed by you"


@dataclass(frozen=True)
class Fingerprints:
    """Fingerprints that the operator vouches for: address → those of its keys."""

    of: Mapping[str, frozenset[str]]

    @classmethod
    def parse(cls, text: str | None, hosts: Iterable[Host]) -> Fingerprints:
        """From `HOST=SHA256:…,HOST=SHA256:…`, or a file with one `HOST SHA256:…` a line.

        A file may name more hosts than are asked for now; on the command line that is a mistake.

        Raises:
            UserError: a part of it is something else, or the file cannot be read.
        """
        if not text or not text.strip():
            return cls({})
        from_file = "=" not in text
        entries = _read(Path(text)) if from_file else re.split(r"[\s,]+", text.strip())
        addresses = {host.address for host in hosts}
        given: dict[str, set[str]] = {}
        for entry in filter(None, entries):
            name, _, fingerprint = re.sub(r"\s+", "=", entry.strip()).partition("=")
            if not FINGERPRINT.fullmatch(fingerprint):
                raise UserError(
                    f"--fingerprints: {entry!r} is not HOST=SHA256:… with the 43 characters that "
                    "`ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` shows on the host"
                )
            address = normalise_address(name)
            if address in addresses:
                given.setdefault(address, set()).add(fingerprint)
            elif not from_file:
                raise UserError(f"--fingerprints names {name}, which is not among the hosts of --ips")
        return cls({address: frozenset(prints) for address, prints in given.items()})

    def vouch_for(self, host: Host, key: PublicKey) -> bool:
        return key.fingerprint in self.of.get(host.address, ())


def _read(file: Path) -> list[str]:
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"--fingerprints: cannot read the file {file}: {reason}") from None
    return [line for line in lines if not line.lstrip().startswith("#")]


def judge(host: Host, key: PublicKey, known_hosts: str, fingerprints: Fingerprints) -> Trust | None:
    """Why `key` is believed to be the host's; None where only a person can tell.

    Args:
        known_hosts: text of the files of this machine.

    Raises:
        HostError: it is not the key that is known, or not the one whose fingerprint was given.
    """
    if key in revoked_keys_of(known_hosts, host.known_hosts_name):
        raise HostError(f"its host key is revoked: {key.fingerprint}", "give the host a new key (ssh-keygen -A)")
    shown = f"{key.kind} {key.fingerprint}"
    if host.address in fingerprints.of:
        if fingerprints.vouch_for(host, key):
            return Trust.GIVEN
        raise HostError(
            f"its host key is not the one of --fingerprints: it presents {shown}",
            "compare at its console (ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub); if that differs too, something "
            "else answers at this address",
        )
    known = keys_of(known_hosts, host.known_hosts_name)
    if key in known:
        return Trust.KNOWN
    if known:
        raise HostError(
            f"its host key changed: it presents {shown}, known is {known[0].kind} {known[0].fingerprint}",
            "if the host was installed anew, compare at its console and run again with --fingerprints "
            f"{host}=SHA256:…, which replaces the old key everywhere; if not, something else answers in its place",
        )
    return None
