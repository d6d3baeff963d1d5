"""Figures of register tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from biassurgery.errors import BadOption
from biassurgery.findings.register_means import RegisterMeans
from biassurgery.plots.activations import activations_3d
from biassurgery.plots.figures import BLUE, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def register_attention(shares: Mapping[str, float]) -> Figure:
    """[CLS]'s attention by role, as `attention_by_role` returns it.

    Registers are named as in the paper, from 1: the role `register:2` is register 3. Source: Sun et
    al. 2024, figure 16.

    Args:
        shares: of the attention (0 to 1), by role.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    figure = new_figure(1.2 + 0.9 * len(shares), 3.2)
    axes = figure.subplots()
    bars = axes.bar(
        [_paper_name(role) for role in shares],
        [100 * share for share in shares.values()],
        color=BLUE,
        width=0.65,
    )
    axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.tick_params(axis="x", rotation=30)
    plain(axes, "attention of [CLS], mean over images and heads", "", "share (%)")
    return figure


def register_means(means: RegisterMeans, layer: int | None = None) -> Figure:
    """Magnitudes of the register means at one block's input, register x channel.

    Registers are named as in the paper, from 1. Source: Sun et al. 2024, figure 14.

    Args:
        means: what `calibrate_registers` returned, or `RegisterMeans.load(path)`.
        layer: None: the one with the largest magnitude.

    Raises:
        BadOption: a layer that there is not.
        MissingPackage: matplotlib is not installed.
    """
    count = len(means.values)
    chosen = int(means.values.abs().flatten(1).amax(1).argmax()) if layer is None else layer
    if not 0 <= chosen < count:
        raise BadOption(f"layer: {layer}; the means are of blocks 0 to {count - 1}.")
    registers = [_paper_name(f"register:{i}") for i in range(means.values.shape[1])]
    return activations_3d(
        means.values[chosen],
        tokens=registers,
        title=f"register means at the input of block {chosen}",
    )


def _paper_name(role: str) -> str:
    """A role as figures 14 and 16 name it, where registers are counted from 1."""
    kind, _, index = role.partition(":")
    return f"{kind} {int(index) + 1}" if index else role
