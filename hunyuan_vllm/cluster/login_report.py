"""What the set-up of logins did on each host"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hunyuan_vllm.cluster.host_keys import PublicKey, Trust
from hunyuan_vllm.cluster.problems import Problem


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


NAMED = 8  # up to so many hosts there is room for their names before the matrix


def show(report: Report, console: Console) -> None:
    """Print the report."""
    console.print(_hosts(report.hosts))
    console.print("Logins by key, from the row's host to the column's:", soft_wrap=True)
    console.print(_matrix(report))
    for host in report.hosts:
        for problem in host.problems:
            _say(console, host.name, problem.what, problem.remedy)
    for (target, problem), sources in _unexplained(report).items():
        _say(console, f"{', '.join(sources)} → {target}", problem.what, problem.remedy)
    console.print(Text(_verdict(report), style="bold"), soft_wrap=True)


def _unexplained(report: Report) -> dict[tuple[str, Problem], list[str]]:
    """Failed logins between hosts without a problem of their own: (target, problem) → sources."""
    ill = {host.name for host in report.hosts if host.problems}
    found: dict[tuple[str, Problem], list[str]] = {}
    for pair in report.pairs:
        if pair.problem is not None and pair.source not in ill and pair.target not in ill:
            found.setdefault((pair.target, pair.problem), []).append(pair.source)
    return found


def _hosts(hosts: Iterable[HostReport]) -> Table:
    table = Table()
    for title in ("#", "host", "host key", "its own key", "changed", "state"):
        table.add_column(title, overflow="fold")
    for number, host in enumerate(hosts, 1):
        host_key = f"{host.host_key.kind} {host.host_key.fingerprint}\n" if host.host_key else ""
        user_key = "" if host.user_key is None else "made" if host.key_made else "there before"
        changed = "\n".join(host.changed) or "nothing"
        state = Text("ok", style="green") if not host.problems else Text("failed", style="red")
        name = host.name if host.hostname in (None, host.name) else f"{host.name}\n({host.hostname})"
        table.add_row(str(number), *map(Text, (name, host_key + (host.trust or ""), user_key, changed)), state)
    return table


def _matrix(report: Report) -> Table:
    numbers = {host.name: str(number) for number, host in enumerate(report.hosts, 1)}
    targets = list(dict.fromkeys(pair.target for pair in report.pairs))
    pairs = {(pair.source, pair.target): pair for pair in report.pairs}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column("from", no_wrap=True)
    few = len(targets) <= NAMED
    for target in targets:
        table.add_column(numbers[target], justify="center", no_wrap=True)
    for source in dict.fromkeys(pair.source for pair in report.pairs):
        cells = [_cell(pairs[source, target]) for target in targets]
        table.add_row(Text(f"{numbers[source]} {source}" if few else numbers[source]), *cells)
    return table


def _cell(pair: Pair) -> Text:
    if pair.ok:
        return Text("ok", style="green")
    return Text("no", style="red") if pair.tried else Text("-", style="dim")


def _say(console: Console, where: str, what: str, remedy: str) -> None:
    # Text, not markup: some of it is what a host sent.
    console.print(Text.assemble((f"{where}: ", "bold red"), what), soft_wrap=True)
    console.print(Text(f"    {remedy}"), soft_wrap=True)


def _verdict(report: Report) -> str:
    proved = sum(pair.ok for pair in report.pairs)
    changed = "files were changed" if report.changed else "nothing was changed"
    text = f"{proved} of {len(report.pairs)} logins proved, {changed}."
    return text if report.ok else f"{text} Mend the above and run it again."
