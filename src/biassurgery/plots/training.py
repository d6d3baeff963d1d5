"""Massive activations through training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from biassurgery.errors import BadOption
from biassurgery.plots.figures import BLUE, GREEN, GREY, RED, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOOKS = ((BLUE, "o"), (RED, "^"), (GREEN, "s"), (GREY, "v"))
_NEEDED = ("step", "loss", "top_1", "median")


def training_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """The largest magnitude, the median and the loss of several models through their training.

    Source: Sun et al. 2024, section 4.3, figures 9 and 10; what `examples/results` holds of the
    runs of `examples/train_gpt2_attention_bias.py`.

    Args:
        runs: by name, a row an evaluation, each with `step`, `loss`, `top_1` and `median`, the
            largest and the median magnitude of the layer where the former is largest.

    Raises:
        BadOption: no run, more than four, or a row without one of these.
        MissingPackage: matplotlib is not installed.
    """
    if not 0 < len(runs) <= len(_LOOKS):
        raise BadOption(f"runs: {len(runs)}; give one to four, by name.")
    for name, rows in runs.items():
        missing = sorted({key for row in rows for key in _NEEDED if key not in row})
        if missing or not rows:
            raise BadOption(f"runs: {name!r} has {len(rows)} rows; missing: {missing or 'all'}.")
    figure = new_figure(9.0, 3.4)
    magnitudes, losses = figure.subplots(1, 2)
    for (name, rows), (colour, marker) in zip(runs.items(), _LOOKS):
        steps = [row["step"] for row in rows]
        style = dict(color=colour, marker=marker, markersize=3.5, linewidth=1.2)
        magnitudes.plot(steps, [row["top_1"] for row in rows], label=name, **style)
        magnitudes.plot(steps, [row["median"] for row in rows], ":", color=colour, linewidth=1)
        losses.plot(steps, [row["loss"] for row in rows], label=name, **style)
    magnitudes.set_yscale("log")
    plain(magnitudes, "largest magnitude; dotted: median", "step", "magnitude")
    plain(losses, "held-out loss", "step", "nats a token")
    losses.legend(fontsize=8, frameon=False)
    return figure
