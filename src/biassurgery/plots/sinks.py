"""Figures of attention sinks by what they do."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from biassurgery.findings.sink_kinds import KINDS, SinkKinds
from biassurgery.plots.figures import BLUE, GREEN, RED, few_ticks, legend_beside, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEAST = 1e-4  # of a ratio that is drawn
_LOOKS = dict(zip(KINDS, (("#dddddd", "."), (BLUE, "o"), (RED, "^"), (GREEN, "s"))))


def sink_kinds(kinds: SinkKinds) -> Figure:
    """Which heads have a sink that does nothing, and which one that sends the same to all.

    Left a cell for each layer and head; right each head by how large the sinks' values are and how
    much attention they get. Source: Fesser et al. 2026 (arXiv 2606.08105).

    Args:
        kinds: what `evaluate.sink_kinds` returned.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    layers = sorted({one.layer for one in kinds.heads})
    heads = 1 + max(one.head for one in kinds.heads)
    figure = new_figure(9.6, min(9.0, max(3.8, 1.4 + 0.16 * len(layers))))
    cells, points = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _cells(cells, kinds, layers, heads)
    _points(points, kinds)
    return figure


def _cells(axes: Any, kinds: SinkKinds, layers: list[int], heads: int) -> None:
    from matplotlib.colors import ListedColormap

    grid = [[float("nan")] * heads for _ in layers]
    for one in kinds.heads:
        grid[layers.index(one.layer)][one.head] = KINDS.index(one.kind)
    colours = ListedColormap([_LOOKS[kind][0] for kind in KINDS])
    axes.imshow(grid, aspect="auto", cmap=colours, vmin=-0.5, vmax=3.5, interpolation="nearest")
    step = 1 + len(layers) // 16
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_xticks([edge - 0.5 for edge in range(1, heads)], minor=True)
    axes.set_yticks([edge - 0.5 for edge in range(1, len(layers))], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    axes.locator_params("x", integer=True, nbins=min(heads, 12))
    plain(axes, "what the sinks of each head do", "head", "layer")
    axes.spines[["left", "bottom"]].set_visible(False)


def _points(axes: Any, kinds: SinkKinds) -> None:
    for kind, (colour, marker) in _LOOKS.items():
        group = [one for one in kinds.heads if one.kind == kind]
        axes.scatter(
            [max(one.value, _LEAST) for one in group],
            [100 * one.share for one in group],
            s=26,
            color="#999999" if kind == "no sink" else colour,
            marker=marker,
            lw=0,
            alpha=0.85,
            label=f"{kind} ({len(group):,})",
        )
    axes.axhline(100 * kinds.min_share, color="0.6", linewidth=0.8, linestyle=":")
    axes.axvline(kinds.max_value, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    values = [max(one.value, _LEAST) for one in kinds.heads]
    few_ticks(axes.xaxis, math.log10(max(values) / min(values)))
    plain(
        axes,
        "each head's sinks",
        "norm of the sinks' values / of other tokens'",
        "share of the attention (%)",
    )
    legend_beside(axes)
