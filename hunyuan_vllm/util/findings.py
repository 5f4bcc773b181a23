"""What a check found: one line for each thing checked, with a remedy where something is wrong"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """SKIPPED: it could not be checked; the text says why. Only a PROBLEM changes the exit status."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        remedy: what to do about it; every warning and problem has one.
        items: all the tensors, files or ids it is about; `text` may only count them.
    """

    subject: str
    text: str
    remedy: str = ""
    status: Status = Status.PROBLEM
    items: tuple[str, ...] = ()

    def __str__(self) -> str:
        """On one line, for an error message."""
        return f"{self.subject}: {self.text}" + (f"; {self.remedy}" if self.remedy else "")


@dataclass
class Section:
    """Findings under one title."""

    title: str
    findings: list[Finding] = field(default_factory=list)

    def ok(self, subject: str, text: str) -> None:
        self.findings.append(Finding(subject, text, status=Status.OK))

    def skipped(self, subject: str, text: str, remedy: str = "") -> None:
        self.findings.append(Finding(subject, text, remedy, Status.SKIPPED))

    def warning(self, subject: str, text: str, remedy: str, items: Iterable[str] = ()) -> None:
        self.findings.append(Finding(subject, text, remedy, Status.WARNING, tuple(items)))

    def problem(self, subject: str, text: str, remedy: str, items: Iterable[str] = ()) -> None:
        self.findings.append(Finding(subject, text, remedy, Status.PROBLEM, tuple(items)))

    @property
    def sound(self) -> bool:
        return not any(finding.status == Status.PROBLEM for finding in self.findings)


def exit_status(sections: Iterable[Section]) -> int:
    """0 if nothing is a problem, else 1."""
    return 0 if all(section.sound for section in sections) else 1


def sections_json(sections: Iterable[Section]) -> list[dict[str, Any]]:
    """For --json: statuses as words, items in full."""
    return [asdict(section) for section in sections]
