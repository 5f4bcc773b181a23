"""What `check` and `doctor` found: lines with a status, and a remedy where something is wrong."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """SKIPPED: it could not be looked at; the text says why. Only a PROBLEM changes the exit status."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        subject: what was looked at, in a word or two.
        text: what was seen.
        remedy: what to do about it; every warning and problem has one.
        items: all the tensors, files or ids it is about, which `text` may only count.
    """

    subject: str
    status: Status
    text: str
    remedy: str = ""
    items: tuple[str, ...] = ()


@dataclass
class Section:
    """Findings under one title."""

    title: str
    findings: list[Finding] = field(default_factory=list)

    def ok(self, subject: str, text: str) -> None:
        self.findings.append(Finding(subject, Status.OK, text))

    def skipped(self, subject: str, why: str, remedy: str = "") -> None:
        self.findings.append(Finding(subject, Status.SKIPPED, why, remedy))

    def warning(self, subject: str, text: str, remedy: str, items: Iterable[str] = ()) -> None:
        self.findings.append(Finding(subject, Status.WARNING, text, remedy, tuple(items)))

    def problem(self, subject: str, text: str, remedy: str, items: Iterable[str] = ()) -> None:
        self.findings.append(Finding(subject, Status.PROBLEM, text, remedy, tuple(items)))

    @property
    def sound(self) -> bool:
        return not any(finding.status == Status.PROBLEM for finding in self.findings)


def exit_status(sections: Iterable[Section]) -> int:
    """0 if nothing is a problem, else 1."""
    return 0 if all(section.sound for section in sections) else 1


def sections_json(sections: Iterable[Section]) -> list[dict[str, Any]]:
    """For --json: statuses as words, items in full."""
    return [asdict(section) for section in sections]


def some(items: Sequence[str], limit: int = 3) -> str:
    """The first of them, and how many more there are."""
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit:,} more"


def some_alike(items: Sequence[str], limit: int = 6) -> list[str]:
    """Lines that stand for `items`: those that differ only in numbers, as a layer's or an expert's, share one."""
    if len(items) <= limit:
        return list(items)
    alike = defaultdict(list)
    for item in items:
        alike[re.sub(r"\d+(?:[.,]\d+)*(?:e[-+]?\d+)?", "*", item)].append(item)
    lines = [group[0] if len(group) == 1 else f"{pattern} ({len(group):,})" for pattern, group in alike.items()]
    return lines if len(lines) <= limit else [*lines[: limit - 1], f"and {len(lines) - limit + 1:,} more kinds"]
