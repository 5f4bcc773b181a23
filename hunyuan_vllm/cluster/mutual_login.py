"""Mutual logins: every host, and this machine, may log in to every host by key, with its host key pinned, and did so.

Each step takes all machines as far as they get; a machine that fails a step keeps its problem, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from hunyuan_vllm.cluster.host_keys import Fingerprints, PublicKey, Trust
from hunyuan_vllm.cluster.hosts import Host
from hunyuan_vllm.cluster.login_report import HostReport, Pair, Report
from hunyuan_vllm.cluster.logins import Steps
from hunyuan_vllm.cluster.machine import Machine
from hunyuan_vllm.cluster.problems import Problem
from hunyuan_vllm.cluster.ssh import Credentials

__all__ = ["Dialogue", "MutualLogin"]


class Dialogue(Protocol):
    """What a person is asked, where there is one to ask."""

    def confirm_host_keys(self, keys: Sequence[tuple[Host, PublicKey]]) -> bool:
        """Whether these are the hosts' keys; False also where no one can say."""

    def ask_password(self, hosts: Sequence[Host]) -> str | None:
        """The password of these hosts; None where no one can say."""


class MutualLogin:
    """One run.

    Args:
        hosts: each once.
        known_hosts: the host keys this machine knows, as text of such a file.
        credentials: for the first login; once keys are distributed, the one of this machine is enough.
        timeout: seconds for each connection and each command.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        known_hosts: str,
        fingerprints: Fingerprints,
        credentials: Credentials,
        dialogue: Dialogue,
        steps: Steps,
        timeout: float,
    ) -> None:
        self._known_hosts = known_hosts
        self._fingerprints = fingerprints
        self._credentials = credentials
        self._dialogue = dialogue
        self._steps = steps
        self._here = Machine(None, HostReport("this machine"), timeout)
        self._hosts = [Machine(host, HostReport(host.address), timeout) for host in hosts]
        self._all = self._hosts

    def run(self) -> Report:
        """All of it. Connections are closed whatever ends it."""
        try:
            self._here.attempt(Machine.look)
            self._trust_host_keys()
            self._log_in()
            self._each("SSH files", [one for one in self._hosts if one.shell], Machine.look)
            if not any(one.is_account_of(self._here) for one in self._hosts):
                self._all = [self._here, *self._hosts]
            usable = [one for one in self._all if one.account]
            self._each("keys", usable, Machine.make_key)
            self._distribute(usable)
            return Report([one.report for one in self._all], self._prove())
        finally:
            for one in self._hosts:
                one.close()

    def _each(self, title: str, machines: Sequence[Machine], action: Callable[[Machine], None]) -> None:
        self._steps.run(title, machines, lambda machine: machine.attempt(action))

    def _trust_host_keys(self) -> None:
        self._each("host keys", self._hosts, lambda one: one.fetch_host_key(self._known_hosts, self._fingerprints))
        asked = [one for one in self._hosts if not one.report.trust and not one.report.problems]
        if not asked:
            return
        keys = [(one.host, one.report.host_key) for one in asked]
        confirmed = self._dialogue.confirm_host_keys([(host, key) for host, key in keys if host and key])
        for one in asked:
            if confirmed:
                one.report.trust = Trust.CONFIRMED
            else:
                one.report.add(_unconfirmed(one))

    def _log_in(self) -> None:
        trusted = [one for one in self._hosts if one.report.trust]
        self._each("logins", trusted, lambda one: one.log_in(self._credentials))
        waiting = [one for one in trusted if one.password_needed]
        if not waiting:
            return
        password = self._dialogue.ask_password([one.host for one in waiting if one.host])
        if password:
            credentials = Credentials(self._credentials.keys, password)
            self._each("logins with the password", waiting, lambda one: one.log_in(credentials))
        for one in waiting:
            if one.password_needed:
                one.report.add(one.password_needed)

    def _distribute(self, usable: Sequence[Machine]) -> None:
        lines = [one.public_line for one in self._all if one.public_line]
        trusted = [one for one in self._hosts if one.report.trust]
        keys = {one.host: one.report.host_key for one in trusted}
        pins = {host: key for host, key in keys.items() if host and key}
        replace = [one.host for one in trusted if one.host and one.report.trust is Trust.GIVEN]
        self._each("authorized_keys", [one for one in usable if one.host], lambda one: one.admit(lines))
        self._each("known_hosts", usable, lambda one: one.pin(pins, replace))

    def _prove(self) -> list[Pair]:
        """Every pair that can be tried, each source's one after the other, so that no target meets all at once."""
        proved: dict[tuple[str, str], Pair] = {}

        def prove_from(item: tuple[int, Machine]) -> None:
            position, source = item
            for target in targets[position:] + targets[:position]:
                pair = source.prove(target)
                proved[pair.source, pair.target] = pair

        sources = [one for one in self._all if one.account and "ssh" in one.account.tools]
        targets = [one.host for one in self._hosts if one.account and one.host]
        self._steps.run("proof of every pair", list(enumerate(sources)), prove_from)
        pairs = []
        for source in self._all:
            for target in self._hosts:
                name = target.report.name
                pairs.append(proved.get((source.report.name, name)) or _untried(source, target))
        self._explain(pairs)
        return pairs

    def _explain(self, pairs: Sequence[Pair]) -> None:
        """Where logins to a host failed and its home directory is to blame, say so once, at the host."""
        failed = {pair.target for pair in pairs if pair.tried and not pair.ok}
        for one in self._hosts:
            if one.report.name in failed and one.account and (problem := one.account.strict_modes_problem()):
                one.report.add(problem)


def _unconfirmed(one: Machine) -> Problem:
    key = one.report.host_key
    assert one.host is not None and key is not None
    return Problem(
        f"its host key is not known and was not confirmed: {key.kind} {key.fingerprint}",
        f"compare it at the host's console (ssh-keygen -lf /etc/ssh/ssh_host_{key.kind.lower()}_key.pub) and give "
        f"--fingerprints {one.host}={key.fingerprint}",
    )


def _untried(source: Machine, target: Machine) -> Pair:
    at = target if target.account is None else source
    problem = Problem(f"not tried: see {at.report.name}", "mend that first")
    return Pair(source.report.name, target.report.name, problem, tried=False)
