"""What came of setting up mutual logins: each host, each pair, every problem with its remedy; for programs as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from hunyuan_vllm.cluster.problems import Problem
from hunyuan_vllm.cluster.public_key import PublicKey
from hunyuan_vllm.cluster.trust import Trust

__all__ = ["HostReport", "Pair", "Report"]


@dataclass
class HostReport:
    """One machine.

    Attributes:
        name: as the operator gave it.
        host_key, trust: its host key and why it is believed; None where it was not reached or not believed.
        user_key: public half of the key with which it logs in to others.
        key_made: whether that was made in this run.
        changed: files (below the home directory) that this run wrote.
    """

    name: str
    hostname: str | None = None
    host_key: PublicKey | None = None
    trust: Trust | None = None
    user_key: PublicKey | None = None
    key_made: bool = False
    changed: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def add(self, problem: Problem) -> None:
        """Note a problem, once."""
        if problem not in self.problems:
            self.problems.append(problem)


@dataclass(frozen=True)
class Pair:
    """One login without a password, from a machine to a host. `tried` is false where a problem made it pointless."""

    source: str
    target: str
    problem: Problem | None = None
    tried: bool = True

    @property
    def ok(self) -> bool:
        return self.problem is None


@dataclass(frozen=True)
class Report:
    """The whole run. It is a success when every pair was proved and no host has a problem."""

    hosts: list[HostReport]
    pairs: list[Pair]

    @property
    def ok(self) -> bool:
        return all(pair.ok for pair in self.pairs) and not any(host.problems for host in self.hosts)

    @property
    def changed(self) -> bool:
        return any(host.changed for host in self.hosts)

    def to_json(self) -> str:
        hosts = [
            {
                "host": host.name,
                "hostname": host.hostname,
                "host_key": _key(host.host_key),
                "trust": host.trust,
                "user_key": _key(host.user_key),
                "key_made": host.key_made,
                "changed": host.changed,
                "problems": [_problem(problem) for problem in host.problems],
            }
            for host in self.hosts
        ]
        pairs = [
            {"from": pair.source, "to": pair.target, "ok": pair.ok, "tried": pair.tried,
             "problem": _problem(pair.problem)}
            for pair in self.pairs
        ]  # fmt: skip
        return json.dumps({"ok": self.ok, "changed": self.changed, "hosts": hosts, "pairs": pairs}, indent=2)


def _key(key: PublicKey | None) -> dict[str, str] | None:
    return None if key is None else {"type": key.type, "fingerprint": key.fingerprint}


def _problem(problem: Problem | None) -> dict[str, Any] | None:
    return None if problem is None else {"what": problem.what, "remedy": problem.remedy}
