"""Figures of what massive activations do to attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from biassurgery.errors import BadOption
from biassurgery.plots.activations import draw_state, tokens_standing_out
from biassurgery.plots.figures import BLUE, RED, legend_beside, new_figure, plain, readable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from biassurgery.measure.recorded import Record

_FEW = 16  # tokens that are all named
_STAGES = ("block_input", "norm_output", "q", "k", "v")


def attention_logits(
    logits: Mapping[int, Tensor], *, tokens: Sequence[str] | None = None
) -> Figure:
    """Attention logits by layer, on one scale around 0: a column that stands out is a sink.

    Source: Sun et al. 2024, figures 5 and 6.

    Args:
        logits: (n, n) by layer, as `evaluate.mean_attention_logits` returns it; NaN stays white.
        tokens: labels, where there are as many as n; None: positions.

    Raises:
        BadOption: no layer, another shape, or a number of labels that is not n.
        MissingPackage: matplotlib is not installed.
    """
    if not logits or any(each.dim() != 2 for each in logits.values()):
        shapes = {layer: tuple(each.shape) for layer, each in logits.items()}
        raise BadOption(f"logits: {shapes or 'none'}; give (n, n) by layer.")
    most = max(each[each.isfinite()].abs().max().item() for each in logits.values())
    columns = min(4, len(logits))
    rows = -(-len(logits) // columns)
    figure = new_figure(2.6 * columns + 0.8, 2.6 * rows + 0.3)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    drawn = None
    for axes, (layer, values) in zip(panels, logits.items()):
        drawn = axes.imshow(values.float().numpy(), vmin=-most, vmax=most, cmap="RdBu_r")
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.tick_params(labelsize=7)
        _name(axes, values.shape, tokens)
    for axes in panels[len(logits) :]:
        axes.set_axis_off()
    assert drawn is not None
    bar = figure.colorbar(drawn, ax=list(panels), fraction=0.03, pad=0.01)
    bar.set_label("attention logit, mean over heads", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def _name(axes: Any, shape: Sequence[int], tokens: Sequence[str] | None) -> None:
    """Token strings on both axes where there are few, else the count of tokens speaks."""
    axes.set_xlabel("key", fontsize=8)
    axes.set_ylabel("query", fontsize=8)
    if tokens is None:
        return
    if len(tokens) != shape[0] or shape[0] != shape[1]:
        raise BadOption(f"tokens: {len(tokens)} labels for logits {tuple(shape)}; give one each.")
    if len(tokens) <= _FEW:
        names = [readable(token) for token in tokens]
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)


def trajectory(
    record: Record,
    layer: int,
    *,
    tokens: Sequence[str] | None = None,
) -> Figure:
    """From a block's input over its norm to queries, keys and values: magnitudes of one sequence.

    The tokens that stand out in the input have another colour in every panel. Source: Sun et
    al. 2024, section 4.2, figure 7.

    Args:
        record: of `record(model, what=("block_input", "norm_output", "q", "k", "v"))`; its first
            row is drawn.
        layer: 0-based.
        tokens: a label for each; None: positions.

    Raises:
        BadOption: a quantity or layer that was not recorded, or a number of labels that is not T.
        MissingPackage: matplotlib is not installed.
    """
    states = {stage: _first_row(record, stage, layer) for stage in _STAGES}
    marked = tokens_standing_out(states["block_input"])
    figure = new_figure(13.5, 8.4)
    titles = ("input of the block", "after the norm", "queries", "keys", "values")
    for place, (state, title) in enumerate(zip(states.values(), titles)):
        axes = figure.add_subplot(2, 3, place + 1 + (place > 1), projection="3d")
        draw_state(axes, state, tokens, points=128, lines=32, marked=marked)
        axes.set_title(title, fontsize=10)
    return figure


def value_updates(record: Record, layer: int, *, tokens: Sequence[str] | None = None) -> Figure:
    """What attention adds at each token, split into the part from the sinks and that from the rest.

    Left their norms; right how alike the updates of all tokens are: the cosine of each with the
    mean of the others. The part from the sinks is nearly the same at every token: a bias. Source:
    Sun et al. 2024, section 4.2.

    Args:
        record: of `record(model, what="value_updates")`; its first row is drawn, heads side by
            side, without the first token, which sees nothing else.
        layer: 0-based.
        tokens: a label for each; None: positions.

    Raises:
        BadOption: it was not recorded, or a sequence of fewer than three tokens.
        MissingPackage: matplotlib is not installed.
    """
    parts = record["value_updates"][layer][:, 0]
    updates = parts.detach().float().cpu().transpose(1, 2).flatten(2)[:, 1:]
    count = updates.shape[1]
    if count < 2:
        raise BadOption(f"record: a sequence of {count + 1} tokens; give three or more.")
    figure = new_figure(9.4, 3.2)
    norms, alike = figure.subplots(1, 2)
    at = range(1, count + 1)
    for update, name, colour, marker in zip(updates, ("sinks", "the rest"), (RED, BLUE), "os"):
        style = dict(color=colour, marker=marker, markersize=3, linewidth=1, label=f"from {name}")
        norms.plot(at, update.norm(dim=-1).numpy(), **style)
        others = (update.sum(0) - update) / (count - 1)
        alike.plot(at, cosine_similarity(update, others, dim=-1).numpy(), **style)
    plain(norms, f"value updates of layer {layer}", "token", "norm")
    plain(alike, "how alike they are across tokens", "token", "cosine with the mean of the others")
    alike.set_ylim(top=1.02)
    legend_beside(alike)
    if tokens is not None and len(tokens) == count + 1 <= _FEW:
        for axes in (norms, alike):
            axes.set_xticks(at, [readable(token) for token in tokens[1:]], rotation=60, ha="right")
    return figure


def _first_row(record: Record, name: str, layer: int) -> Tensor:
    """(T, channels): the first row, heads side by side."""
    row = record[name][layer][0]
    return row if row.dim() == 2 else torch.cat(list(row), -1)
