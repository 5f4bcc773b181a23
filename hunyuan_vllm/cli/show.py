"""Findings on a terminal, and errors of commands that can be resumed"""

import errno
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hunyuan_vllm.util.findings import Finding, Section, Status, exit_status, sections_json
from hunyuan_vllm.util.streams import say
from hunyuan_vllm.util.text import group_similar, plural

STYLES = {Status.OK: "green", Status.WARNING: "yellow", Status.PROBLEM: "bold red", Status.SKIPPED: "cyan"}
WORDS = {Status.OK: "ok", Status.WARNING: "warning", Status.PROBLEM: "PROBLEM", Status.SKIPPED: "skipped"}
WIDTH = 9  # of the column of words
MIN_WIDTH = 60


def show_sections(sections: Iterable[Section], console: Console) -> None:
    """Print them; lines wrap only on a terminal."""
    for section in sections:
        if section.findings:
            console.print(Text(section.title, style="bold"))
            for finding in section.findings:
                _show(finding, console)


def end_report(sections: Sequence[Section], as_json: bool, **more: object) -> NoReturn:
    """Print the findings, as JSON with `more` beside them or for a reader, and exit with their status."""
    status = exit_status(sections)
    if as_json:
        report = {"sound": status == 0, **more, "sections": sections_json(sections)}
        print(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        console = Console(highlight=False)
        show_sections(sections, console)
        console.print(tally(sections), style="bold red" if status else "green", soft_wrap=True)
    raise typer.Exit(status)


def show_table(table: Table) -> None:
    """On standard output; as wide as it has to be where that is a file."""
    console = Console(highlight=False)
    console.print(table) if console.is_terminal else Console(width=200, highlight=False).print(table)


def tally(sections: Iterable[Section]) -> str:
    """The numbers of problems and warnings, in words."""
    found = [finding.status for section in sections for finding in section.findings]
    counts = {name: found.count(Status(name)) for name in ("problem", "warning")}
    words = [plural(count, name) for name, count in counts.items() if count]
    if skipped := found.count(Status.SKIPPED):
        words.append(f"{skipped} skipped")
    return ", ".join(words) or "nothing wrong"


def _show(finding: Finding, console: Console) -> None:
    line = Text.assemble(
        (WORDS[finding.status].ljust(WIDTH), STYLES[finding.status]), (finding.subject, "bold"), ": ", finding.text
    )
    _print(line, console, hang=WIDTH)
    for item in group_similar(finding.items):
        _print(Text(f"- {item}"), console, indent=WIDTH + 2, hang=2)
    if finding.remedy:
        _print(Text(f"→ {finding.remedy}" if _has_arrows(console) else f"-> {finding.remedy}"), console, WIDTH + 2, 2)


def _print(text: Text, console: Console, indent: int = 0, hang: int = 0) -> None:
    indent += 2
    if not console.is_terminal or console.width < MIN_WIDTH:
        console.print(Text(" " * indent) + text, soft_wrap=True)
        return
    lines = text.wrap(console, console.width - indent - hang)
    for number, line in enumerate(lines):
        console.print(Text(" " * (indent + (hang if number else 0))) + line, soft_wrap=True)


def _has_arrows(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


@contextmanager
def resumable(target: Path) -> Iterator[None]:
    """End the command in one line, with exit status 130 if it is interrupted and 3 if the disk fails; `target` is what
    the body writes. All other errors pass.
    """
    try:
        yield
    except KeyboardInterrupt:
        say("stopped; run the same command again to resume")
        raise typer.Exit(130) from None
    except OSError as error:
        if error.errno not in DISK:
            raise
        say(f"{error.strerror} while writing {target}: run the same command again to resume")
        raise typer.Exit(3) from None
