"""What everything that is printed is made of; rich is imported when something is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

MOST_ROWS = 40
_WIDTH = 120  # of plain text, where there is no terminal to ask


class Printable:
    """Something with a rich form, which `print` shows as plain text."""

    __slots__ = ()

    def __rich__(self) -> Any:
        raise NotImplementedError  # abstract

    def __str__(self) -> str:
        return as_text(self)


def as_text(renderable: Any) -> str:
    """A renderable as plain text, without colours."""
    from io import StringIO

    from rich.console import Console

    console = Console(
        file=StringIO(), width=_WIDTH, color_system=None, force_terminal=False, _environ={}
    )
    console.print(renderable)
    return console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined]


def number(value: float) -> str:
    """Four significant digits, or all of those before the point."""
    if not math.isfinite(value):
        return {math.inf: "inf", -math.inf: "-inf"}.get(value, "nan")
    if value and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.3e}"
    decimals = 3 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(decimals, 0), 4)}f}"


def noted(content: Table, note: str) -> Group:
    """A table with a line under it; a caption would be wrapped to the table's width."""
    from rich.console import Group
    from rich.text import Text

    return Group(content, Text(f"  {note}")) if note else Group(content)


def table(title: str, *columns: str, left: tuple[str, ...] = ()) -> Table:
    """An empty table; numbers stand right, the columns in `left` left."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    empty = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in columns:
        empty.add_column(column, justify="left" if column in left else "right")
    return empty
