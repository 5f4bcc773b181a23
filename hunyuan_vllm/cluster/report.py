"""What the set-up of logins did on each host, as a table and as JSON"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hunyuan_vllm.cluster.host_keys import PublicKey
from hunyuan_vllm.cluster.hosts import Host
from hunyuan_vllm.util.findings import Finding


@dataclass(frozen=True)
class Pair:
    """One login without a password, from a host to a host. `tried` is false if an earlier problem prevents it."""

    source: str
    target: str
    problem: Finding | None = None
    tried: bool = True

    @property
    def ok(self) -> bool:
        return self.problem is None


@dataclass(frozen=True)
class Report:
    """The result of a run. It is a success when every pair was verified and no host has a problem."""

    hosts: list[Host]
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
                "user_key": _key(PublicKey.parse((host.public_line or "").split())),
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


def _problem(problem: Finding | None) -> dict[str, Any] | None:
    return None if problem is None else {"what": problem.text, "remedy": problem.remedy}


def show(report: Report, console: Console) -> None:
    console.print(_hosts(report.hosts))
    for host in report.hosts:
        for problem in host.problems:
            _show_problem(console, host.name, problem.text, problem.remedy)
    for (target, text, remedy), sources in _unexplained(report).items():
        _show_problem(console, f"{', '.join(sources)} → {target}", text, remedy)
    console.print(Text(_summary(report), style="bold"), soft_wrap=True)


def _unexplained(report: Report) -> dict[tuple[str, str, str], list[str]]:
    """Failed logins between hosts without a problem of their own: (target, text, remedy) → sources."""
    failed = {host.name for host in report.hosts if host.problems}
    found: dict[tuple[str, str, str], list[str]] = {}
    for pair in report.pairs:
        if pair.problem is not None and pair.source not in failed and pair.target not in failed:
            found.setdefault((pair.target, pair.problem.text, pair.problem.remedy), []).append(pair.source)
    return found


def _hosts(hosts: Iterable[Host]) -> Table:
    table = Table()
    for title in ("#", "host", "host key", "its own key", "changed", "state"):
        table.add_column(title, overflow="fold")
    for number, host in enumerate(hosts, 1):
        host_key = f"{host.host_key.kind} {host.host_key.fingerprint}\n" if host.host_key else ""
        user_key = "" if host.public_line is None else "made" if host.key_made else "existed"
        changed = "\n".join(host.changed) or "nothing"
        state = Text("ok", style="green") if not host.problems else Text("failed", style="red")
        name = host.name if host.hostname in (None, host.name) else f"{host.name}\n({host.hostname})"
        table.add_row(str(number), *map(Text, (name, host_key + (host.trust or ""), user_key, changed)), state)
    return table


def _show_problem(console: Console, where: str, text: str, remedy: str) -> None:
    # Text, not markup: some of it is what a host sent.
    console.print(Text.assemble((f"{where}: ", "bold red"), text), soft_wrap=True)
    console.print(Text(f"    {remedy}"), soft_wrap=True)


def _summary(report: Report) -> str:
    verified = sum(pair.ok for pair in report.pairs)
    changed = "files were changed" if report.changed else "nothing was changed"
    text = f"{verified} of {len(report.pairs)} logins verified, {changed}."
    return text if report.ok else f"{text} Solve the problems above and run it again."
