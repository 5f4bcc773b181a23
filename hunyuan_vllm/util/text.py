"""Counts, sizes, durations and lists as messages write them"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

GIB = 2**30
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # of a repository, "owner/name"


def plural(count: int, noun: str) -> str:
    """As in "1 file", "1,200 files" and "2 processes"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}{'es' if noun.endswith('s') else 's'}"


def duration(seconds: float) -> str:
    """As in "2:03" or "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def gigabytes(size: float) -> str:
    """As in "1.5 GB", or "12.0 MB" below half a gigabyte."""
    return f"{size / 1e9:,.1f} GB" if size >= 5e8 else f"{size / 1e6:,.1f} MB"


def gibibytes(size: float) -> str:
    """As in "1.5 GiB"."""
    return f"{size / GIB:,.1f} GiB"


def some(items: Sequence[str], limit: int = 3) -> str:
    """The first of them, and how many more there are."""
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit:,} more"


def differences(values: Mapping[str, str]) -> str:
    """What differs between hosts, from host → value, as in "3.11 on a, b; 3.12 on c"; "" where all are alike."""
    groups = defaultdict(list)
    for host, value in values.items():
        groups[value].append(host)
    return "; ".join(f"{value} on {some(hosts)}" for value, hosts in groups.items()) if len(groups) > 1 else ""


def group_similar(items: Sequence[str], limit: int = 6) -> list[str]:
    """At most `limit` lines that stand for `items`: items that differ only in numbers share a line."""
    if len(items) <= limit:
        return list(items)
    alike = defaultdict(list)
    for item in items:
        alike[re.sub(r"\d+(?:[.,]\d+)*(?:e[-+]?\d+)?", "*", item)].append(item)
    lines = [group[0] if len(group) == 1 else f"{pattern} ({len(group):,})" for pattern, group in alike.items()]
    return lines if len(lines) <= limit else [*lines[: limit - 1], f"and {len(lines) - limit + 1:,} more kinds"]
