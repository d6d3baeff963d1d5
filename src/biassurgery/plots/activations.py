"""Figures of magnitudes: by layer, and of one hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from biassurgery.errors import BadOption
from biassurgery.findings.detection import Detection
from biassurgery.plots.figures import (
    BLUE,
    GREEN,
    GREY,
    RED,
    legend_beside,
    new_figure,
    plain,
    readable,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMED = 4  # channels, and tokens, that are named on their axes because they stand out
_STANDS_OUT = 0.1  # of the largest peak
_FEW = 12  # tokens that are all named
_RANKS = ((BLUE, "o"), (RED, "^"), (GREEN, "v"))


def magnitudes(detection: Detection) -> Figure:
    """The three largest magnitudes and the median at each block's output.

    Means over sequences. Source: Sun et al. 2024, figures 4 and 13.

    Args:
        detection: what `detect` returned.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    figure = new_figure(6.0, 3.4)
    axes = figure.subplots()
    layers = [row.layer for row in detection.layers]
    for rank, (colour, marker) in enumerate(_RANKS):
        axes.plot(
            layers,
            [row.top[rank] for row in detection.layers],
            f"{marker}-",
            color=colour,
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
    legend_beside(axes)
    return figure


def activations_3d(
    hidden: Tensor,
    *,
    tokens: Sequence[str] | None = None,
    points: int = 256,
    lines: int = 48,
    title: str = "",
) -> Figure:
    """Magnitudes of one hidden state over channels and tokens, a line for each token.

    Tokens and channels whose largest magnitude is a tenth of the largest of all stand out: they are
    named, and these tokens are drawn in another colour. Source: Sun et al. 2024, figures 1, 11, 14.

    Args:
        hidden: (T, D), one sequence at one block's output.
        tokens: a label for each; None: their positions.
        points: how many channels a line has at most: of each run of neighbours the largest is
            drawn, where it is.
        lines: how many there are at most: of each run of neighbouring tokens that with the largest
            magnitude is drawn, where it is.
        title: of the figure.

    Raises:
        BadOption: another shape, or a number of labels that is not T.
        MissingPackage: matplotlib is not installed.
    """
    figure = new_figure(5.8, 4.8)
    axes = figure.add_subplot(projection="3d")
    draw_state(axes, hidden, tokens, points=points, lines=lines)
    axes.set_title(title, fontsize=10)
    return figure


def draw_state(
    axes: Any,
    hidden: Tensor,
    tokens: Sequence[str] | None,
    *,
    points: int,
    lines: int,
    marked: set[int] | None = None,
) -> None:
    """One hidden state (T, D) on axes of three dimensions; see `activations_3d`.

    `marked` are the tokens in another colour, which are drawn and named whatever their size if
    there are no more of them than `lines`; None: those that stand out.
    """
    _check(hidden, tokens, points, lines)
    magnitude = hidden.detach().abs().float().cpu()
    names = [str(i) for i in range(len(magnitude))] if tokens is None else [*map(readable, tokens)]
    given = sorted(marked) if marked is not None and len(marked) <= lines else []
    marked = tokens_standing_out(hidden) if marked is None else marked
    for token in sorted({*_largest(magnitude.amax(1), lines).tolist(), *given}):
        at = _largest(magnitude[token], points)
        out = token in marked
        axes.plot(
            at.numpy(),
            [token] * len(at),
            magnitude[token, at].numpy(),
            color=RED if out else BLUE,
            linewidth=1.2 if out else 0.6,
            alpha=1.0 if out else 0.6,
        )
    _name_channels(axes, magnitude.amax(0))
    _name_tokens(axes, magnitude.amax(1), names, given)
    axes.tick_params(labelsize=7)
    axes.set_xlabel("channel", fontsize=9, labelpad=8)
    axes.set_ylabel("token", fontsize=9, labelpad=18)
    axes.set_zlabel("magnitude", fontsize=9)
    axes.set_zlim(bottom=0)
    axes.set_box_aspect(None, zoom=0.92)  # long labels stay on the page


def _check(hidden: Tensor, tokens: Sequence[str] | None, points: int, lines: int) -> None:
    if hidden.dim() != 2 or not hidden.numel() or points < 1 or lines < 1:
        raise BadOption(
            f"hidden: shape {tuple(hidden.shape)}, points={points}, lines={lines}; give one hidden"
            " state (T, D), one point and one line or more."
        )
    if tokens is not None and len(tokens) != len(hidden):
        raise BadOption(
            f"tokens: {len(tokens)} labels for {len(hidden)} tokens; give one for each."
        )


def _largest(line: Tensor, points: int) -> Tensor:
    """Where in a line (D,) the largest of each of `points` runs is; all, if there are no more."""
    size = -(-len(line) // points)
    runs = line.split(size)
    largest = [number * size + run.argmax().item() for number, run in enumerate(runs)]
    return line.new_tensor(largest).long()


def tokens_standing_out(hidden: Tensor) -> set[int]:
    """The tokens of a hidden state (T, D) that stand out by their largest magnitude."""
    return set(_standing_out(hidden.detach().abs().float().cpu().amax(1)))


def _standing_out(peaks: Tensor) -> list[int]:
    """Those of the peaks (N,) that are a tenth of the largest, the largest first."""
    count = int((peaks >= _STANDS_OUT * peaks.max()).sum())
    return peaks.argsort(descending=True, stable=True)[:count].tolist()


def _apart(indices: Sequence[int], distance: int, most: int) -> list[int]:
    """The first of the indices that are not too near to each other to be written side by side."""
    named: list[int] = []
    for index in indices:
        if len(named) < most and all(abs(index - other) > distance for other in named):
            named.append(index)
    return sorted(named)


def _name_channels(axes: Any, peaks: Tensor) -> None:
    """The channels that stand out, and the first and last where there is room."""
    last = len(peaks) - 1
    ticks = _apart([*_standing_out(peaks)[:_NAMED], 0, last], len(peaks) // 12, _NAMED + 2)
    axes.set_xticks(ticks, map(str, ticks))


def _name_tokens(axes: Any, peaks: Tensor, names: Sequence[str], given: Sequence[int]) -> None:
    """All tokens where they are few, else those given, else those that stand out."""
    ticks = list(range(len(names)))
    if len(names) > _FEW:
        ticks = _apart(given or _standing_out(peaks), len(names) // (2 * _FEW), _NAMED)
    axes.set_yticks(ticks, [names[i] for i in ticks], ha="left", va="center")
