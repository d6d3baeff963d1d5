"""Findings of large models: a `repr` fits a screen, and tables say what they leave out."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import biassurgery as bs
from biassurgery.evaluate.interventions import Row
from biassurgery.findings import render
from biassurgery.findings.detection import (
    LayerSummary,
    PositionSummary,
    RoleSummary,
    UniformChannel,
)
from biassurgery.findings.detection_tables import features_note
from biassurgery.findings.key_values import KeyValues
from biassurgery.findings.observations import TokenCount
from biassurgery.findings.register_means import RegisterMeans
from biassurgery.findings.register_neurons import RegisterNeuron, RegisterNeurons
from biassurgery.findings.sinks import LayerSinks, Sinks

LINES, COLUMNS = 24, 100
LAYERS = st.integers(1, 200)
HEADS = st.integers(1, 256)
NAMES = st.text(min_size=1, max_size=200).filter(str.isprintable)


def fits(finding: object) -> None:
    lines = repr(finding).splitlines()
    assert 0 < len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS


def sinks_of(layers: int, heads: int) -> Sinks:
    share = tuple(0.1234567890123 for _ in range(heads))
    of = [LayerSinks(i, share, share, share, 10**6, 0.5, 0.5, {}) for i in range(layers)]
    return Sinks(tuple(of), 0.3, 10**6, 10**9)


def sites_of(layers: int, step: int) -> bs.Sites:
    roles = ("start", "elsewhere")
    return bs.Sites(
        [
            bs.Site(layer, channel, role, 1e5 + channel, 1.0, 5, margin=7.0)
            for layer in range(0, layers, step)
            for channel in (1, 2533, 99_999)
            for role in roles
        ],
        origin=bs.Origin("a_long_architecture_name", layers, 100_000, roles, 100.0, 1000.0),
    )


def detection_of(layers: int, heads: int, step: int, text: str) -> bs.Detection:
    words = tuple(TokenCount(i, text, 10**5) for i in range(30))
    at = range(0, layers, step)
    return bs.Detection(
        sites_of(layers, step),
        tuple(LayerSummary(i, (1e6, 1e5, 1e4), 0.1) for i in range(layers)),
        tuple(RoleSummary(i, "elsewhere", 10**6, 1.0, 10**6, words) for i in at),
        tuple(PositionSummary(i, p, 9) for i in at for p in range(99)),
        tuple(range(100_000)),
        10**6,
        10**9,
        sinks_of(layers, heads),
        "",
        tuple(UniformChannel(i, c, 1e4, 1e3, 1.0) for i in range(layers) for c in range(3)),
    )


@settings(max_examples=15, deadline=None)
@given(layers=LAYERS, heads=HEADS, step=st.integers(1, 3), text=NAMES)
def test_every_repr_fits_a_screen(layers: int, heads: int, step: int, text: str) -> None:
    found = detection_of(layers, heads, step, text)
    for finding in (found, found.sites, found.sinks, found.sinks.layers[0], bs.Sites()):
        fits(finding)
    empty = bs.Detection(bs.Sites(), found.layers, (), (), (), 1, 2, None, text)
    fits(empty)
    keys = torch.ones(layers, heads, 4)
    fits(KeyValues(keys, keys, 0 * keys, 0 * keys, 10**9, "a_long_architecture_name"))
    fits(RegisterMeans(torch.ones(layers, heads, 4)))
    neurons = tuple(RegisterNeuron(layer, 10**5, 1e5) for layer in range(0, layers, step))
    fits(RegisterNeurons(neurons, "dinov2", layers, 4, 0, 1.0, 9, 9))


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 200), columns=st.integers(1, 30), label=NAMES)
def test_a_comparison_fits_a_screen(rows: int, columns: int, label: str) -> None:
    values = {f"a measured number {i}": 1.5 for i in range(columns)}
    comparison = bs.evaluate.Comparison(tuple(Row(None, label, values) for _ in range(rows)))
    fits(comparison)
    if rows + 1 > LINES:
        assert f"and {rows + 1 - LINES + 1} more lines" in repr(comparison)


def test_four_lines_come_first() -> None:
    found = detection_of(60, 12, 1, "\n")
    what, where, sinks, after = str(found).splitlines()[:4]
    assert what == (
        "massive: channels 99999, 2533, 1 in blocks 0 to 59, up to 199,999 (1,999,990 medians)"
    )
    assert where == "where: at block 0, elsewhere 100.0 % ('\\n', '\\n', '\\n', and 27 more)"
    assert sinks == ("sinks: start tokens get 12.3 to 12.3 % of a layer's attention; metric 12.3 %")
    assert after.startswith("next: ")
    assert repr(found).splitlines()[1:] == [f"  {line}" for line in found.summary]


def test_what_a_table_leaves_out_is_counted() -> None:
    layers = 60
    roles = tuple(RoleSummary(i, "start", i + 1, 1.0) for i in range(layers))
    places = tuple(PositionSummary(i, p, 9 + i) for i in range(layers) for p in range(8))
    uniform = tuple(UniformChannel(3, c, 1e4, 1e3, 1.0) for c in range(75))
    many = detection_of(layers, 2, 1, "a")
    found = bs.Detection(many.sites, many.layers, roles, places, (), 1, 2, None, "", uniform)
    text = str(found)
    for title, more in (
        ("Massive activations by role", "and 20 more"),
        ("Positions of massive activations", "and 20 more"),
        ("Uniform channels", "and 35 more"),
    ):
        lines = text[text.index(title) :].splitlines()
        assert all(line.strip() for line in lines[4:44])
        assert next(line.strip() for line in lines[44:48] if line.strip()) == more
    assert "0 (9), 1 (9), 2 (9), 3 (9), 4 (9), 5 (9), and 2 more" in text


def test_layers_that_are_alike_are_one_row() -> None:
    text = str(detection_of(12, 2, 1, "a"))
    table = text[text.index("by role") : text.index("Positions of")]
    rows = [line.split() for line in table.splitlines() if "elsewhere" in line]
    assert [row[:6] for row in rows] == [["0", "to", "11", "elsewhere", "1,000,000", "1,000,000"]]


def medians(*values: float) -> tuple[LayerSummary, ...]:
    return tuple(LayerSummary(i, (9.0, 8.0, 7.0), value) for i, value in enumerate(values))


def test_outlier_features_are_the_shortest_list() -> None:
    def said(features: list[int], width: int | None) -> str:
        return features_note(features, width, medians(0.5, 15.61)).splitlines()[0]

    assert said([], 576) == "outlier features: none"
    assert said(list(range(576)), 576) == "outlier features: 576 of 576 channels"
    assert said([3, 9], 576) == "outlier features: 2 of 576 channels (3, 9)"
    but = [channel for channel in range(576) if channel not in (5, 70)]
    assert said(but, 576) == "outlier features: 574 of 576 channels (all but 5, 70)"
    assert said(list(range(100)), 576).endswith("17, 18, 19, and 80 more)")
    assert said([1], None) == "outlier features: 1 (1)"
    remark = features_note([1], 576, medians(0.5, 15.61)).splitlines()[1]
    assert "6.0 is absolute;" in remark
    assert "0.5000 to 15.61" in remark


def test_ranges() -> None:
    assert render.ranges([3, 1, 2, 7, 9, 10]) == "1 to 3, 7, 9, 10"
    assert render.ranges(range(0, 40, 2)) == "0, 2, 4, 6, 8, 10, and 14 more"
    assert render.ranges([]) == ""
