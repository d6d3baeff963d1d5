"""One part of a report: a figure with the table that it is drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Columns = Mapping[str, Sequence[Any]]


def columns_of(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> Columns:
    """A table by columns, of its rows."""
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}


@dataclass(frozen=True)
class Section:
    """A figure, its table, and words that say how to read both.

    Attributes:
        name: short, of letters and dashes; names the downloads.
        title: a heading.
        about: what is shown and how it is read.
        columns: the table, a list of numbers or strings for each heading; None is an empty cell.
        chart: a Vega-Lite specification without data: its data are the table, named `rows`.
        picture: a PNG, where the figure is none that a chart can be.
        alt: the figure in a sentence, for those who do not see it.
        source: the table or figure of the paper.
    """

    name: str
    title: str
    about: str
    columns: Columns = field(default_factory=dict)
    chart: Mapping[str, Any] | None = None
    picture: bytes | None = None
    alt: str = ""
    source: str = ""
