"""The life of a massive activation in one figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from biassurgery.findings.value_life import ValueLife
from biassurgery.plots.figures import BLUE, GREY, RED, legend_beside, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WEIGHTS = 3  # that are named


def value_life(life: ValueLife) -> Figure:
    """From the weight that writes a value, over its way through the blocks, to the attention.

    Above its magnitude behind every block, at the token that carries it and at others; the weights
    that write it are named where they do. Below the share of attention on that token.

    Args:
        life: what `evaluate.value_life` returned.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    attending = [one for one in life.blocks if one.attention is not None]
    figure = new_figure(9.2, 5.6 if attending else 3.6)
    panels = figure.subplots(1 + bool(attending), 1, sharex=True, squeeze=False)[:, 0]
    _values(panels[0], life)
    if attending:
        _attention(panels[1], life)
    panels[-1].set_xlabel("block", fontsize=9)
    panels[-1].locator_params("x", integer=True)
    return figure


def _values(axes: Any, life: ValueLife) -> None:
    layers = [one.layer for one in life.blocks]
    carrying = [abs(one.value) for one in life.blocks]
    site = life.site
    axes.plot(layers, carrying, "o-", color=RED, markersize=4, label=f"the token ({site.role})")
    usual = [one.ordinary for one in life.blocks]
    axes.plot(layers, usual, "s--", color=GREY, markersize=3, label="other tokens, mean")
    _log(axes, carrying + usual)
    plain(axes, f"channel {site.channel}, {life.carriers:,} tokens", "", "magnitude behind block")
    writers = sorted(life.weights, key=lambda weight: -abs(weight.contribution))[:_WEIGHTS]
    for layer in {weight.layer for weight in writers}:
        axes.axvline(layer, color=BLUE, linewidth=0.8, linestyle=":")
    if writers:
        lines = "\n".join(
            f"{weight.place} = {weight.value:.3g}\n  writes {weight.contribution:,.0f}"
            for weight in writers
        )
        axes.plot([], [], ":", color=BLUE, linewidth=0.8, label=f"written by\n{lines}")
    legend_beside(axes)


def _log(axes: Any, values: list[float]) -> None:
    if all(value > 0 for value in values):
        axes.set_yscale("log")
    else:  # a channel that is zero before the value is born
        axes.set_yscale("symlog", linthresh=max(1e-3, min(v for v in values if v > 0)))
        axes.set_ylim(bottom=0)


def _attention(axes: Any, life: ValueLife) -> None:
    drawn = [one for one in life.blocks if one.attention is not None]
    layers = [one.layer for one in drawn]
    for name, label, style in (
        ("strongest", "the head with most", "^:"),
        ("attention", "mean over heads", "o-"),
    ):
        shares = [100 * getattr(one, name) for one in drawn]
        axes.plot(layers, shares, style, color=BLUE, markersize=4, linewidth=1.2, label=label)
    axes.set_ylim(0, 105)
    plain(axes, "attention of other tokens on it", "", "share (%)")
    legend_beside(axes)
