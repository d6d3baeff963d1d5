"""Tables for the terminal: pure functions from results to rich renderables."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from biassurgery.detect import Detection
    from biassurgery.evaluate import Comparison
    from biassurgery.sites import Sites
    from biassurgery.support import SupportMatrix

_MOST_ROWS = 40
_MOST_POSITIONS = 6
_WIDTH = 120  # of plain text, where there is no terminal to ask
_SHARES = ("top1",)  # numbers from 0 to 1 that are shown in per cent


def sites_table(sites: Sites) -> Group | Text:
    """One row a site: where it is, its calibrated values, and how far they are from all others of the channel."""
    from rich.text import Text

    if not len(sites):
        return Text(f"No massive activations{_definition(sites)}.")
    table = _table("Massive activations", "layer", "channel", "role", "mean", "std", "count", "margin", left=("role",))
    for site in sites[:_MOST_ROWS]:
        role = f"{site.role}, level {site.cluster + 1}" if site.cluster else site.role
        margin = "" if site.margin is None else f"{number(site.margin)}x"
        table.add_row(str(site.layer), str(site.channel), role, number(site.mean), number(site.std), f"{site.count:,}", margin)
    more = len(sites) - _MOST_ROWS
    return _noted(table, f"and {more} more, up to layer {sites.layers()[-1]}" if more > 0 else "")


def detection_tables(detection: Detection) -> Group:
    """Magnitudes per layer, which tokens the massive activations are on, and the sites."""
    from rich.console import Group

    layers = _table("Magnitudes at each block's output", "layer", "top 1", "top 2", "top 3", "median", "top 1 / median", "massive")
    massive: dict[int, int] = {}
    for role in detection.roles:
        massive[role.layer] = massive.get(role.layer, 0) + role.count
    for layer in detection.layers:
        found = f"{massive[layer.layer]:,}" if layer.layer in massive else ""
        layers.add_row(str(layer.layer), *(number(top) for top in layer.top), number(layer.median), number(layer.ratio), found,
                       style="bold" if found else "")
    features = ", ".join(map(str, detection.outlier_features)) or "none"
    note = f"means over {detection.sequences:,} sequences, {detection.tokens:,} tokens; outlier features: {features}\n"
    if not detection.roles:
        return Group(_noted(layers, note), sites_table(detection.sites))
    roles = _table("Tokens with massive activations", "layer", "role", "count", "share", left=("role",))
    for role in detection.roles[:_MOST_ROWS]:
        roles.add_row(str(role.layer), role.role, f"{role.count:,}", f"{100 * role.share:.1f} %")
    return Group(_noted(layers, note), roles, _positions_table(detection), sites_table(detection.sites))


def _positions_table(detection: Detection) -> Table:
    """One row a layer: the positions where values meet the definition most often."""
    table = _table("Positions with values that meet the definition", "layer", "position (count)", left=("position (count)",))
    for layer in dict.fromkeys(each.layer for each in detection.positions):
        here = [each for each in detection.positions if each.layer == layer]
        more = f", and {len(here) - _MOST_POSITIONS} more" if len(here) > _MOST_POSITIONS else ""
        table.add_row(str(layer), ", ".join(f"{each.position} ({each.count:,})" for each in here[:_MOST_POSITIONS]) + more)
    return table


def comparison_table(comparison: Comparison) -> Table:
    """One row a mode, one column a measured number."""
    names = list(comparison.rows[0].values)
    table = _table("Interventions", "mode", *names, left=("mode",))
    for row in comparison.rows:
        table.add_row(row.label, *(f"{100 * value:.2f} %" if name in _SHARES else number(value) for name, value in row.values.items()))
    return table


def listing_tables(families: dict[str, str], modes: dict[str, str], published: dict[str, str]) -> Group:
    """What this library knows: architectures and what they read, modes and what they do, checkpoints and what is published of them."""
    from rich.console import Group

    tables = [("Supported architectures", "family", "reads", families), ("Modes", "mode", "effect", modes),
              ("Checkpoints with published sites", "checkpoint", "massive activations", published)]
    group = []
    for title, name, meaning, rows in tables:
        table = _table(title, name, meaning, left=(name, meaning))
        for row in rows.items():
            table.add_row(*row)
        group.append(table)
    return Group(*group)


def support_table(matrix: SupportMatrix) -> Table:
    """One row an architecture, one column a mode: how many checks passed."""
    entries = {(entry.family, entry.mode): entry for entry in matrix}
    modes = list(dict.fromkeys(entry.mode for entry in matrix))
    table = _table("Checks passed, by architecture and mode", "architecture", *modes, "with", left=("architecture", "with"))
    for family in dict.fromkeys(entry.family for entry in matrix):
        row = [entries.get((family, mode)) for mode in modes]
        versions = dict.fromkeys(version for entry in row if entry for version in entry.versions)
        table.add_row(family, *(str(len(entry.checks)) if entry else "" for entry in row), ", ".join(versions))
    return table


def as_text(renderable: Any) -> str:
    """A renderable as plain text, without colours."""
    from io import StringIO

    from rich.console import Console

    console = Console(file=StringIO(), width=_WIDTH, color_system=None, force_terminal=False, _environ={})
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


def _definition(sites: Sites) -> str:
    """What was looked for, where that is known."""
    magnitude, ratio = sites.origin.min_magnitude, sites.origin.min_ratio
    if magnitude is None or ratio is None:
        return ""
    return f": no magnitude is above {magnitude:g} and above {ratio:g} times the median of its sequence"


def _noted(table: Table, note: str) -> Group:
    """A table with a line under it; a caption would be wrapped to the table's width."""
    from rich.console import Group
    from rich.text import Text

    return Group(table, Text(f"  {note}")) if note else Group(table)


def _table(title: str, *columns: str, left: tuple[str, ...] = ()) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    return table
