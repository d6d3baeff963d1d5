"""Sections of one short sequence: its tokens by block, its attention logits, its value updates."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity

from biassurgery.adapters.attentions import attentions
from biassurgery.adapters.registry import Host
from biassurgery.errors import MissingPackage, UnsupportedModel
from biassurgery.measure.mean_logits import mean_attention_logits
from biassurgery.measure.reading import reading
from biassurgery.measure.record import record
from biassurgery.plots.activations import activations_3d
from biassurgery.reports.charts import around_zero, cells, lines, with_slider
from biassurgery.reports.section import Section, columns_of

_KEYS = 32  # tokens whose attention logits are drawn
_DIGITS = 3  # after the point, of attention logits


def sample_sections(
    host: Host, batch: dict[str, Any], tokens: Sequence[str], born: int
) -> list[Section]:
    """What one sequence shows.

    Args:
        host: the model.
        batch: its arguments, one row.
        tokens: a string for each token.
        born: the block where massive activations are born, or one that stands for it.
    """
    with record(host.root, "block_output") as rec, reading(host.model):
        host.adapter.run(host.model, batch)
    states = {layer: state[0].float().cpu() for layer, state in rec["block_output"].items()}
    sections = [_by_token(states, tokens)]
    picture = _picture(states[born], tokens, born)
    sections += [picture] if picture else []
    try:
        attending = list(attentions(host, None))
    except UnsupportedModel:
        return sections
    return [*sections, _value_updates(host, batch), _logits(host, batch, tokens, attending, born)]


def _by_token(states: dict[int, Tensor], tokens: Sequence[str]) -> Section:
    """The largest value of every token at every block."""
    rows = []
    for layer, state in states.items():
        channels = state.abs().argmax(-1)
        values = state.gather(-1, channels[:, None])[:, 0]
        for place, (channel, value) in enumerate(zip(channels.tolist(), values.tolist())):
            rows.append((place, tokens[place], layer, channel, value, abs(value)))
    names = ("position", "token", "block", "channel", "value", "magnitude")
    columns = columns_of(names, rows)
    most = max(rows, key=lambda row: row[-1])
    return Section(
        "tokens",
        "Which tokens carry them",
        f"The largest value of every token at every block's output, in a sequence of {len(tokens)}"
        " tokens, on a logarithmic scale: a column that lights up is a token with a massive"
        " activation, and the table names its channel.",
        columns,
        cells("position", "block", "magnitude", names, rows=len(states), log=True, labels=tokens),
        alt=f"Cells by token and block: the largest value, {most[4]:,.0f}, is at token"
        f" {most[0]} ({most[1]}), block {most[2]}, channel {most[3]}.",
        source="Sun et al. 2024, section 2.2.",
    )


def _picture(state: Tensor, tokens: Sequence[str], layer: int) -> Section | None:
    """The paper's first figure, where matplotlib is at hand."""
    try:
        figure = activations_3d(state, tokens=tokens)
    except MissingPackage:
        return None
    figure.savefig(stream := BytesIO(), format="png", dpi=110)
    place, channel = divmod(int(state.abs().argmax()), state.shape[1])
    return Section(
        "activations",
        f"One hidden state: the output of block {layer}",
        "Magnitudes over tokens and channels, a line for each token. What is a tenth of the largest"
        " or more is named on the axes.",
        picture=stream.getvalue(),
        alt=f"Magnitudes in three dimensions: the highest is at token {place} ({tokens[place]}),"
        f" channel {channel}.",
        source="Sun et al. 2024, figure 1.",
    )


def _value_updates(host: Host, batch: dict[str, Any]) -> Section:
    """How alike the tokens' value updates are, those from the start token and the rest."""
    rows = []
    with record(host.root, "value_updates") as rec, reading(host.model):
        host.adapter.run(host.model, batch)
    for layer, parts in rec["value_updates"].items():
        updates = parts[:, 0].float().cpu().transpose(1, 2).flatten(2)[:, 1:]
        for name, update in zip(("start token", "all others"), updates):
            others = (update.sum(0) - update) / max(1, len(update) - 1)
            alike = cosine_similarity(update, others, dim=-1).mean().item()
            rows.append((layer, name, alike, update.norm(dim=-1).mean().item()))
    names = ("layer", "from", "likeness", "norm")
    return Section(
        "value-updates",
        "What attention sends from the start token",
        "What attention adds at each token, split into the part from the start token and that from"
        " all others: the mean cosine of a token's part with the mean of the other tokens' parts."
        " Near 1 it is the same for every token: a constant bias.",
        columns_of(names, rows),
        lines("layer", "likeness", "from", names, log=False),
        alt="Two lines over layers: the likeness of value updates across tokens.",
        source="Sun et al. 2024, section 4.2.",
    )


def _logits(
    host: Host, batch: dict[str, Any], tokens: Sequence[str], attending: Sequence[int], born: int
) -> Section:
    """Attention logits, a layer at a time."""
    causal = host.adapter.causal(host.model)
    count = min(_KEYS, len(tokens)) if causal else len(tokens)
    rows = []
    means = mean_attention_logits(host.root, batch)
    for layer, logits in means.items():
        for query, line in enumerate(logits[:count, :count].tolist()):
            seen = line[: query + 1] if causal else line
            rows += [(layer, query, key, round(logit, _DIGITS)) for key, logit in enumerate(seen)]
    names = ("layer", "query", "key", "logit")
    shown = next((layer for layer in attending if layer > born), attending[-1])
    chart = cells("key", "query", "logit", names, rows=count, labels=tokens[:count])
    return Section(
        "logits",
        "Attention logits",
        "Scores before the softmax, mean over heads, one layer at a time: move the slider. Behind"
        " the block where massive activations are born the column of their token stays high while"
        " the others fall.",
        columns_of(names, rows),
        with_slider(around_zero(chart), "layer", attending, shown),
        alt=f"Cells by key and query for the layer of the slider, at first layer {shown}.",
        source="Sun et al. 2024, figures 5 and 6.",
    )
