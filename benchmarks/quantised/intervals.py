"""Cells as a table: perplexities, their ratio to float32, and how sure that ratio is."""

from __future__ import annotations

import math
import random

from quantised.kept import Cells
from quantised.remedies import CONTROL

_DRAWS = 2000  # of windows, for an interval
Losses = list[list[float]]


def table(cells: Cells, rows: list[str], columns: list[str]) -> str:
    """Markdown; a ratio is to float32 under the same remedy, on the same windows."""
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for row in rows:
        shown_cells = []
        for column in columns:
            control = cells.of("float32", CONTROL.get(column, column))
            found = control if row == "float32" else cells.of(row, column)
            shown_cells.append(cell(found, control))
        lines.append(f"| {row} | " + " | ".join(shown_cells) + " |")
    return "\n".join(lines)


def cell(found: Losses, control: Losses) -> str:
    """Mean over seeds, ratio to float32 with the 95 % interval of a paired bootstrap over windows,
    and the range over seeds.
    """
    if not found:
        return ""
    means = over_seeds(found)
    if not control or found == control:
        return shown(means)
    low, ratio, high = interval(means, over_seeds(control))
    text = f"{shown(means)}, {ratio:.3g}x ({low:.3g}-{high:.3g})"
    if len(found) > 1:
        each = sorted(mean(values) for values in found)
        text += f", seeds {exp(each[0]):.4g}-{exp(each[-1]):.4g}"
    return text


def interval(losses: list[float], control: list[float]) -> tuple[float, float, float]:
    """The ratio of two perplexities between the ends of its 95 % interval.

    Windows are drawn in pairs: what makes one hard for both counts for neither.
    """
    differences = [a - b for a, b in zip(losses, control, strict=True)]
    draw = random.Random(0)
    drawn = sorted(mean(draw.choices(differences, k=len(differences))) for _ in range(_DRAWS))
    return exp(drawn[_DRAWS // 40]), exp(mean(differences)), exp(drawn[-_DRAWS // 40])


def over_seeds(found: Losses) -> list[float]:
    """The mean loss of each window."""
    return [mean(list(values)) for values in zip(*found, strict=True)]


def shown(values: list[float]) -> str:
    return f"{exp(mean(values)):.4g}"


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
