"""The tables of a detection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from biassurgery.findings.observations import (
    LayerSummary,
    PositionSummary,
    RoleSummary,
    UniformChannel,
)
from biassurgery.findings.render import MOST_ROWS, listed, noted, number, ranges, table
from biassurgery.findings.summary import quoted, token_list

if TYPE_CHECKING:
    from rich.console import Group

_MOST = 6  # positions or tokens in a cell
_MOST_FEATURES = 20

Rows = Sequence[tuple[str, ...]]


def layers_table(layers: Iterable[LayerSummary], massive: Mapping[int, int], note: str) -> Group:
    """One row a layer: its magnitudes, and how many massive activations it has."""
    columns = ("layer", "top 1", "top 2", "top 3", "median", "top 1 / median", "massive values")
    rows = table("Magnitudes at each block's output", *columns)
    for layer in layers:
        count = massive.get(layer.layer, 0)
        rows.add_row(
            str(layer.layer),
            *(number(top) for top in layer.top),
            number(layer.median),
            number(layer.ratio),
            f"{count:,}" if count else "",
            style="bold" if count else "",
        )
    return noted(rows, note)


def features_note(
    features: Sequence[int], width: int | None, layers: Sequence[LayerSummary]
) -> str:
    """The outlier features in the shortest list: themselves, or those channels that are none."""
    if not features:
        return "outlier features: none"
    others = sorted(set(range(width or 0)) - set(features))
    of = f"outlier features: {len(features):,}" + (f" of {width:,} channels" if width else "")
    if width and len(others) < len(features):
        which = f" (all but {listed(list(map(str, others)), _MOST_FEATURES)})" if others else ""
    else:
        which = f" ({listed(list(map(str, features)), _MOST_FEATURES)})"
    medians = [layer.median for layer in layers] or [0.0]
    return (
        f"{of}{which}\n  (their threshold of 6.0 is absolute; median magnitudes here:"
        f" {number(min(medians))} to {number(max(medians))})"
    )


def roles_table(roles: Sequence[RoleSummary]) -> Group:
    """One row a role, and layers in which it is the same: values, and tokens that hold them."""
    columns = ["layers", "role", "values", "tokens", "share of values"]
    has_words = any(role.words for role in roles)
    if has_words:
        columns.append("which (values)")
    rows = table("Massive activations by role", *columns, left=("role", "which (values)"))
    by_layer = {
        layer: [
            (
                role.role,
                f"{role.count:,}",
                f"{role.tokens:,}",
                f"{100 * role.share:.1f} %",
                *([token_list(role.words, _MOST)] if has_words else []),
            )
            for role in group
        ]
        for layer, group in groupby(roles, lambda role: role.layer)
    }
    merged = _merged(by_layer)
    for row in merged[:MOST_ROWS]:
        rows.add_row(*row)
    return noted(rows, _more(len(merged)))


def positions_table(
    positions: Iterable[PositionSummary], of_patches: bool, not_placed: int
) -> Group:
    """The positions where most massive activations are, of the layers in which they are the same.

    Where the token at a position is always the same, that stands beside it.
    """
    heading = "(row, column) of a patch (values)" if of_patches else "position (values)"
    rows = table("Positions of massive activations", "layers", heading, left=(heading,))
    by_layer = {
        layer: [(listed([_placed(position) for position in group], _MOST),)]
        for layer, group in groupby(positions, lambda position: position.layer)
    }
    merged = _merged(by_layer)
    for row in merged[:MOST_ROWS]:
        rows.add_row(*row)
    note = f"without {not_placed:,} that were read before their channel was known\n"
    return noted(rows, _more(len(merged)) + ("  " + note if not_placed else ""))


def uniform_table(
    channels: Sequence[UniformChannel], massive: Mapping[tuple[int, int], int]
) -> Group:
    """One row a uniform channel, over the layers in which it is one.

    Args:
        channels: uniform ones.
        massive: how many massive values a (layer, channel) has as well.
    """
    columns = ("channel", "layers", "mean magnitude", "mean / median", "tokens", "massive values")
    rows = table("Uniform channels: large at nearly all tokens", *columns, left=("layers",))
    by_channel: dict[int, list[UniformChannel]] = {}
    for channel in channels:
        by_channel.setdefault(channel.channel, []).append(channel)
    order = sorted(by_channel.items(), key=lambda item: -max(one.ratio for one in item[1]))
    for channel, ones in order[:MOST_ROWS]:
        count = sum(massive.get((one.layer, channel), 0) for one in ones)
        rows.add_row(
            str(channel),
            ranges(one.layer for one in ones),
            _from_to([number(one.magnitude) for one in _by_size(ones, "magnitude")]),
            _from_to([number(one.ratio) for one in _by_size(ones, "ratio")]),
            _from_to([f"{100 * one.share:.1f} %" for one in _by_size(ones, "share")]),
            f"{count:,}" if count else "",
        )
    return noted(rows, _more(len(order)))


def _merged(by_layer: Mapping[int, Rows]) -> list[tuple[str, ...]]:
    """The rows of each layer behind its number; those of layers that are alike once."""
    merged = []
    for rows, layers in groupby(by_layer, lambda layer: by_layer[layer]):
        name = ranges(layers)
        merged += [(name, *row) for row in rows]
    return merged


def _placed(position: PositionSummary) -> str:
    tokens = [token for token in position.words if token.count == position.count]
    text = f" {quoted(tokens[0])}" if tokens else ""
    return f"{position.place}{text} ({position.count:,})"


def _more(rows: int) -> str:
    return f"and {rows - MOST_ROWS:,} more\n" if rows > MOST_ROWS else ""


def _by_size(ones: Sequence[UniformChannel], name: str) -> list[UniformChannel]:
    return sorted(ones, key=lambda one: getattr(one, name))


def _from_to(cells: Sequence[str]) -> str:
    return cells[0] if cells[0] == cells[-1] else f"{cells[0]} to {cells[-1]}"
