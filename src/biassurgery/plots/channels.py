"""Figures of channels: massive activations beside outlier features."""

from __future__ import annotations

from typing import TYPE_CHECKING

from biassurgery.errors import BadOption
from biassurgery.findings.channels import Channel, ChannelTable
from biassurgery.plots.figures import BLUE, GREY, RED, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMED = 4  # channels that are named


def outlier_features(table: ChannelTable) -> Figure:
    """Every channel by its largest value and by what it has elsewhere, at the block of its largest.

    A massive activation is a single value: it stands far above the diagonal. An outlier feature is
    large at most tokens: it stands to the right, near the diagonal. Source: Sun et al. 2024,
    section 2; Dettmers et al. 2022.

    Args:
        table: what `evaluate.channel_table` returned.

    Raises:
        BadOption: every channel is zero.
        MissingPackage: matplotlib is not installed.
    """
    drawn = [one for one in table.channels if one.largest > 0 and one.ordinary > 0]
    if not drawn:
        raise BadOption("table: all of its channels are zero; give one of a model that ran.")
    figure = new_figure(6.2, 4.6)
    axes = figure.subplots()
    low, high = min(one.ordinary for one in drawn), max(one.largest for one in drawn)
    axes.plot([low, high], [low, high], color=GREY, linewidth=0.8, linestyle=":")
    groups = (
        ("others", GREY, "o", [one for one in drawn if not (one.massive or one.outlier)]),
        ("outlier features", BLUE, "s", [one for one in drawn if one.outlier and not one.massive]),
        ("with massive activations", RED, "^", [one for one in drawn if one.massive]),
    )
    for name, colour, marker, group in groups:
        x, y = [one.ordinary for one in group], [one.largest for one in group]
        size = 55 if marker == "^" else 14
        label = f"{name} ({len(group):,})"
        axes.scatter(x, y, s=size, marker=marker, color=colour, alpha=0.75, lw=0, label=label)
    for one in _named(drawn):
        axes.annotate(
            str(one.channel),
            (one.ordinary, one.largest),
            (6, 0),
            textcoords="offset points",
            fontsize=8,
            va="center",
        )
    axes.set(xscale="log", yscale="log")
    plain(
        axes,
        f"channels, each at the block of its largest value; {table.tokens:,} tokens",
        "mean magnitude of its other values",
        "largest magnitude in a sequence",
    )
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def _named(drawn: list[Channel]) -> list[Channel]:
    """The massive ones that stand out most; where there are none, the one channel that does."""
    most = sorted(drawn, key=lambda one: -one.largest / one.ordinary)
    return [one for one in most if one.massive][:_NAMED] or most[:1]
