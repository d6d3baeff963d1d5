"""Tables as figures: ranks, spreads, tokens, interventions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from biassurgery.errors import BadOption
from biassurgery.findings.hidden_state import CarrierTable, MagnitudeTable, VariationTable
from biassurgery.findings.render import number
from biassurgery.plots.figures import BLUE, GREEN, GREY, RED, few_ticks, new_figure, plain, readable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from biassurgery.evaluate.interventions import Comparison

_LINE = 0.27  # inches a row
_MOST = 16  # tokens that are drawn
_WIDE = 20.0  # largest over smallest, from which on a scale is logarithmic
_SHARES = ("top1", "knn", "linear", "zero_shot")  # from 0 to 1, shown in per cent


def magnitude_table(table: MagnitudeTable) -> Figure:
    """The largest magnitudes of a block's output by rank, on a logarithmic scale.

    Source: Sun et al. 2024, table 1.

    Args:
        table: `evaluate.hidden_state_tables(model, batches).magnitudes`.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    names = [row.rank for row in table.rows]
    values = [row.magnitude for row in table.rows]
    figure = new_figure(5.6, 1.1 + _LINE * len(names))
    axes = figure.subplots()
    _rows(axes, names, values, [number(value) for value in values])
    _log(axes, values)
    plain(axes, f"output of block {table.layer}, mean over sequences", "magnitude", "")
    return figure


def variation_table(table: VariationTable) -> Figure:
    """How much values vary over sequences: massive activations, and other places of the state.

    Drawn is the standard deviation over the magnitude of the mean; both are written beside it.
    Source: Sun et al. 2024, table 2.

    Args:
        table: `evaluate.hidden_state_tables(model, batches).variation`.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    names = [
        f"{row.rank}: channel {row.channel}" + ("" if row.token is None else f", token {row.token}")
        for row in table.rows
    ]
    values = [row.spread for row in table.rows]
    written = [f"{number(row.mean)} ± {number(row.variance**0.5)}" for row in table.rows]
    colours = [RED if row.token is None else BLUE for row in table.rows]
    figure = new_figure(7.0, 1.1 + _LINE * len(names))
    axes = figure.subplots()
    _rows(axes, names, values, written, colours)
    _log(axes, values)
    title = f"values at the output of block {table.layer}: mean ± standard deviation"
    plain(axes, title, "standard deviation / magnitude of the mean", "")
    return figure


def carriers(table: CarrierTable) -> Figure:
    """The tokens that hold massive activations: how large, and how often.

    Source: Sun et al. 2024, section 2.2.

    Args:
        table: `evaluate.hidden_state_tables(model, batches, tokenizer=...).carriers`.

    Raises:
        BadOption: nothing meets the definition at this block.
        MissingPackage: matplotlib is not installed.
    """
    if not table.rows:
        raise BadOption(
            f"table: nothing at the output of block {table.layer} meets the definition, so there"
            " is no token to draw; detect() says where something does."
        )
    rows = table.rows[:_MOST]
    channels = list(dict.fromkeys(row.channel for row in table.rows))
    colours = [(RED, BLUE, GREEN, GREY)[min(3, channels.index(row.channel))] for row in rows]
    names = [f"{readable(row.text)}  (channel {row.channel})" for row in rows]
    values = [abs(row.mean) for row in rows]
    written = [f"{number(row.mean)}, {row.count:,} x" for row in rows]
    figure = new_figure(6.4, 1.1 + _LINE * len(names))
    axes = figure.subplots()
    _rows(axes, names, values, written, colours)
    _log(axes, values)
    more = len(table.rows) - len(rows)
    title = f"tokens that carry massive activations, block {table.layer}"
    plain(axes, title + (f" (and {more:,} more)" if more else ""), "magnitude, mean", "")
    return figure


def interventions(table: Comparison) -> Figure:
    """One evaluation under several patches: a panel a measured number, a row a mode.

    A scale is logarithmic where numbers differ by more than twenty times; what is infinite stands
    at its end. Source: Sun et al. 2024, tables 3 to 5.

    Args:
        table: what `compare` returned.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    modes = [row.label for row in table.rows]
    columns = list(table.rows[0].values)
    figure = new_figure(2.0 + 3.2 * len(columns), 1.2 + _LINE * len(modes))
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    for place, (axes, name) in enumerate(zip(panels, columns)):
        percent = 100 if name in _SHARES else 1
        values = [percent * row.values[name] for row in table.rows]
        known = [value for value in values if math.isfinite(value)]
        edge = 3 * max(known, default=1.0)
        drawn = [value if math.isfinite(value) else edge for value in values]
        _rows(axes, modes if not place else [""] * len(modes), drawn, [number(v) for v in values])
        if percent == 1:
            _log(axes, drawn, least=_WIDE)
        plain(axes, "", f"{name} (%)" if percent == 100 else name, "")
    return figure


def _rows(
    axes: Any,
    names: Sequence[str],
    values: Sequence[float],
    written: Sequence[str],
    colours: Sequence[str] | None = None,
) -> None:
    """A dot a row, from above, with its numbers beside it."""
    at = range(len(names))
    axes.scatter(values, at, s=36, color=colours or BLUE, zorder=3)
    for place, (value, text) in enumerate(zip(values, written)):
        axes.annotate(
            text, (value, place), (7, 0), textcoords="offset points", fontsize=8, va="center"
        )
    axes.set_yticks(at, names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.5, alpha=0.4)
    axes.margins(x=0.05)
    low, high = axes.get_xlim()
    axes.set_xlim(min(0.0, low) if low >= 0 else low, high + 0.35 * (high - low))


def _log(axes: Any, values: Sequence[float], least: float = 1.0) -> None:
    """A logarithmic scale, where the values are positive and so far apart, with room for words."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if len(positive) < len(values) or not positive or max(positive) / min(positive) < least:
        return
    decades = max(1.0, math.log10(max(positive) / min(positive)))
    axes.set_xscale("log")
    few_ticks(axes.xaxis, decades)
    axes.set_xlim(min(positive) / 10 ** (0.06 * decades), max(positive) * 10 ** (0.4 * decades))
