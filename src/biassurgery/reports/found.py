"""Sections of what was found over all data: magnitudes, sites, tokens, sinks, linear layers."""

from __future__ import annotations

from biassurgery.evaluate.interventions import Comparison
from biassurgery.findings.detection import Detection
from biassurgery.findings.diagnosis import Diagnosis
from biassurgery.findings.sites import Sites
from biassurgery.reports.charts import cells, dots, lines
from biassurgery.reports.section import Section, columns_of

NEEDED = "Does the model need them?"
_LINEARS = 20
_RANKS = ("largest", "second", "third")


def interventions(table: Comparison, measured_on: str) -> Section:
    """The paper's tables 3, 4 and 5."""
    names = list(table.rows[0].values)
    return Section(
        "interventions",
        NEEDED,
        "The model as it is; with these values set to zero; set to their mean over other data; and,"
        " as the control, with as many other values of the same tokens set to zero. Measured on"
        f" {measured_on}.",
        {"mode": [row.label for row in table.rows]}
        | {name: [row.values[name] for row in table.rows] for name in names},
        source="Sun et al. 2024, tables 3 to 5.",
    )


def magnitudes(found: Detection) -> Section:
    """Figures 4, 10 and 13."""
    rows = [
        (layer.layer, kind, value)
        for layer in found.layers
        for kind, value in zip((*_RANKS, "median"), (*layer.top, layer.median))
    ]
    top = max(found.layers, key=lambda layer: layer.top[0])
    columns = columns_of(("block", "value", "magnitude"), rows)
    return Section(
        "magnitudes",
        "Magnitudes by block",
        "The three largest magnitudes and the median at each block's output, means over"
        f" {found.sequences:,} sequences, on a logarithmic scale. Massive activations are a line"
        " far above the median that jumps up at one block and stays.",
        columns,
        lines("block", "magnitude", "value", ("block", "value", "magnitude")),
        alt=f"Lines over blocks: the largest magnitude is {top.top[0]:,.0f} at block {top.layer},"
        f" where the median is {top.median:.3g}.",
        source="Sun et al. 2024, figure 4.",
    )


def sites(found: Sites) -> Section:
    """What `set_mean` writes, and where."""
    kept = [site for site in found if site.first] or list(found)
    return Section(
        "sites",
        "Sites",
        "Where massive activations are born, or grow: the place, the role of the token (start: the"
        " first of a sequence), the mean, the spread over the data, how many there were, and the"
        " margin: how many times the smallest of them is the largest other value of the channel.",
        {
            "block": [site.layer for site in kept],
            "channel": [site.channel for site in kept],
            "role": [site.role for site in kept],
            "mean": [site.mean for site in kept],
            "spread": [site.std for site in kept],
            "count": [site.count for site in kept],
            "margin": [site.margin for site in kept],
        },
        source="Sun et al. 2024, section 3.",
    )


def sinks(found: Detection) -> Section | None:
    """Attention on the start token, by layer and head."""
    if found.sinks is None:
        return None
    rows = [
        (layer.layer, head, share)
        for layer in found.sinks.layers
        for head, share in enumerate(layer.attention)
    ]
    most = max(found.sinks.layers, key=lambda layer: sum(layer.attention))
    mean = sum(most.attention) / len(most.attention)
    hover = ("layer", "head", "share of the attention")
    return Section(
        "sinks",
        "Attention sinks",
        "The share of the attention of later tokens that the first token gets, in each layer and"
        " head. A layer reads what the block before has written, so sinks begin one layer behind"
        " the block where massive activations are born.",
        columns_of(hover, rows),
        cells("head", "layer", hover[-1], hover, rows=len(found.sinks.layers)),
        alt="Cells by layer and head: the share is highest in layer"
        f" {most.layer}, {100 * mean:.0f} % in the mean over heads.",
        source="Xiao et al. 2023; Sun et al. 2024, section 4.",
    )


def linears(found: Diagnosis) -> Section:
    """What int8 with one scale a tensor trips over."""
    rows = sorted(found.linears, key=lambda linear: -linear.ratio)[:_LINEARS]
    hover = ("linear layer", "ratio", "largest", "largest at")
    return Section(
        "linears",
        "What static int8 trips over",
        "The largest magnitude that each linear layer reads, over that of ordinary tokens. One"
        " int8 scale for a whole tensor leaves ordinary tokens 127 steps divided by this ratio."
        f" The {len(rows)} highest of {len(found.linears):,} layers.",
        {
            "linear layer": [linear.name for linear in rows],
            "ratio": [linear.ratio for linear in rows],
            "largest": [linear.largest for linear in rows],
            "of ordinary tokens": [linear.ordinary for linear in rows],
            "largest at": [str(linear.token) for linear in rows],
        },
        dots("ratio", "linear layer", hover, rows=len(rows)),
        alt=f"Dots: {rows[0].name} has the highest ratio, {rows[0].ratio:,.0f}." if rows else "",
    )


def super_weights(found: Diagnosis) -> Section | None:
    """The single weights that write massive activations."""
    if not found.super_weights:
        return None
    rows = found.super_weights
    return Section(
        "super-weights",
        "The weights that write them",
        "Single weights whose contribution to a massive activation is largest, and how much the"
        " loss of a short text rises, in nats a token, with one of them taken to be zero (empty:"
        " not tried).",
        {
            "weight": [weight.place for weight in rows],
            "value": [weight.value for weight in rows],
            "writes": [weight.contribution for weight in rows],
            "share of its matrix": [weight.share for weight in rows],
            "loss without it": [weight.loss for weight in rows],
        },
        source="Yu et al. 2024.",
    )
