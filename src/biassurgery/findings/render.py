"""What everything that is printed is made of; rich is imported when something is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

MOST_ROWS = 40
SCREEN = (24, 100)  # lines and columns that a `repr` has at most
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


def one_screen(text: str) -> str:
    """A text cut to what a `repr` may have, with a word on what is missing."""
    most, width = SCREEN
    lines = text.splitlines()
    if len(lines) > most:
        lines = [*lines[: most - 1], f"and {len(lines) - most + 1} more lines"]
    return "\n".join(line if len(line) <= width else f"{line[: width - 3]}..." for line in lines)


def listed(words: Sequence[str], most: int) -> str:
    """The first words of a list, and how many more there are: `a, b, and 3 more`."""
    more = len(words) - most
    return ", ".join(words[:most]) + (f", and {more:,} more" if more > 0 else "")


def ranges(numbers: Iterable[int], most: int = 6) -> str:
    """Numbers in ascending order, those that follow on each other in one: `0, 3 to 13`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = [str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a} to {b}" for a, b in runs]
    return listed(words, most)


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
