"""Figures of magnitudes: by layer, and of one hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from biassurgery.errors import BadOption
from biassurgery.findings.detection import Detection
from biassurgery.plots.figures import BLUE, GREY, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TICKS = 3  # channels that are named on the axis
_STANDS_OUT = 0.1  # of the largest peak


def magnitudes(detection: Detection) -> Figure:
    """The three largest magnitudes and the median at each block's output.

    Means over sequences. Source: Sun et al. 2024, figures 4 and 13.

    Args:
        detection: what `detect` returned.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    figure = new_figure(5.2, 3.4)
    axes = figure.subplots()
    layers = [row.layer for row in detection.layers]
    for rank, shade in enumerate((BLUE, "cornflowerblue", "lightsteelblue")):
        axes.plot(
            layers,
            [row.top[rank] for row in detection.layers],
            "o-",
            color=shade,
            markersize=4,
            label=f"top {rank + 1}",
        )
    axes.plot(
        layers,
        [row.median for row in detection.layers],
        "s--",
        color=GREY,
        markersize=3,
        label="median",
    )
    axes.set_yscale("log")
    axes.locator_params("x", integer=True)
    plain(
        axes,
        f"mean over {detection.sequences:,} sequences",
        "block",
        "magnitude at the block's output",
    )
    axes.legend(fontsize=8, frameon=False)
    return figure


def activations_3d(
    hidden: Tensor, *, tokens: Sequence[str] | None = None, points: int = 256, title: str = ""
) -> Figure:
    """Magnitudes of one hidden state over channels and tokens, a line for each token.

    Source: Sun et al. 2024, figures 1, 11 and 14.

    Args:
        hidden: (T, D), one sequence at one block's output.
        tokens: a label for each; None: their positions.
        points: how many channels a line has at most: of each run of neighbours the largest is
            drawn, where it is.
        title: of the figure.

    Raises:
        BadOption: another shape, or a number of labels that is not T.
        MissingPackage: matplotlib is not installed.
    """
    if hidden.dim() != 2 or not hidden.numel() or points < 1:
        raise BadOption(
            f"hidden: shape {tuple(hidden.shape)} and points={points}; give one hidden state (T, D)"
            " and one point or more."
        )
    if tokens is not None and len(tokens) != len(hidden):
        raise BadOption(
            f"tokens: {len(tokens)} labels for {len(hidden)} tokens; give one for each."
        )
    magnitude = hidden.detach().abs().float().cpu()
    figure = new_figure(5.6, 4.6)
    axes = figure.add_subplot(projection="3d")
    for token, line in enumerate(magnitude):
        at = _largest(line, points)
        axes.plot(at.numpy(), [token] * len(at), line[at].numpy(), color=BLUE, linewidth=1.0)
    channels = _apart(magnitude.amax(0), magnitude.shape[1] // 12)
    axes.set_xticks(channels, map(str, channels), fontsize=8)
    axes.tick_params(labelsize=8)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("channel", fontsize=9)
    if tokens is None:
        axes.set_ylabel("token", fontsize=9)
    else:
        axes.set_yticks(range(len(tokens)), tokens, ha="left", fontsize=8)
    axes.set_zlabel("magnitude", fontsize=9)
    axes.set_zlim(bottom=0)
    return figure


def _largest(line: Tensor, points: int) -> Tensor:
    """The channels of a line (D,) to draw: the largest in each of `points` runs, or all."""
    size = -(-len(line) // points)
    runs = line.split(size)
    largest = [number * size + run.argmax().item() for number, run in enumerate(runs)]
    return line.new_tensor(largest).long()


def _apart(peaks: Tensor, distance: int) -> list[int]:
    """The channels that stand out by their peaks (D,), not too near to be written side by side."""
    count = int((peaks >= _STANDS_OUT * peaks.max()).sum())
    named: list[int] = []
    for channel in peaks.argsort(descending=True)[:count].tolist():
        if len(named) < _TICKS and all(abs(channel - other) > distance for other in named):
            named.append(channel)
    return sorted(named)
