"""Numbers as bars on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.bar import Bar
from rich.table import Table

__all__ = ["bar_chart"]

WIDTH = 40


def bar_chart(title: str, rows: Sequence[tuple[str, float]], digits: int = 0) -> Table:
    """A linear bar a row, the greatest of which fills the width; `digits` decimals are shown beside it."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(width=WIDTH)
    table.add_column(justify="right", no_wrap=True)
    most = max((value for _, value in rows), default=0) or 1
    for name, value in rows:
        table.add_row(name, Bar(most, 0, value, color="cyan"), f"{value:,.{digits}f}")
    return table
