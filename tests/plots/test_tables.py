"""Figures of tables, channels, a value's life, sinks and training: what they are drawn from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import biassurgery as bs
from biassurgery import plots
from biassurgery.errors import BadOption
from biassurgery.evaluate.interventions import Comparison, Row
from biassurgery.findings.channels import Channel, ChannelTable
from biassurgery.findings.hidden_state import (
    Carrier,
    CarrierTable,
    MagnitudeTable,
    RankedMagnitude,
    Variation,
    VariationTable,
)
from biassurgery.findings.sink_kinds import HeadSinks, SinkKinds
from biassurgery.findings.site import Site
from biassurgery.findings.value_life import LifeInBlock, ValueLife
from tests import models
from tests.plots.drawn import rendered

pytest.importorskip("matplotlib", reason="needs matplotlib (the report extra)")
RESULTS = Path(__file__).parents[2] / "examples" / "results"


def dots_of(axes):
    """The points of a panel of rows, from above."""
    (dots,) = axes.collections[:1]
    return dots.get_offsets().tolist()


def texts_of(axes):
    return [text.get_text() for text in axes.texts]


def names_of(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def overlapping(axes):
    """Labels of rows that touch each other on the drawn figure."""
    boxes = [label.get_window_extent() for label in axes.get_yticklabels() if label.get_text()]
    return [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


def test_magnitudes_by_rank():
    rows = (("top 1", 7100.0), ("top 100", 90.8), ("median", 0.3))
    table = MagnitudeTable(15, tuple(RankedMagnitude(*row) for row in rows))
    (axes,) = rendered(plots.magnitude_table(table)).axes
    assert dots_of(axes) == [[value, place] for place, (_, value) in enumerate(rows)]
    assert texts_of(axes) == ["7,100", "90.80", "0.3000"]
    assert names_of(axes) == ["top 1", "top 100", "median"]
    assert axes.get_xscale() == "log"
    assert axes.yaxis_inverted()
    assert "block 15" in axes.get_title()
    assert not overlapping(axes)


def test_spreads_of_values():
    rows = (
        Variation("massive, start", None, 7, -2000.0, 10000.0),
        Variation("median", 3, 4, 0.5, 0.25),
    )
    (axes,) = rendered(plots.variation_table(VariationTable(2, rows))).axes
    assert dots_of(axes) == [[pytest.approx(0.05), 0], [pytest.approx(1.0), 1]]
    assert names_of(axes) == ["massive, start: channel 7", "median: channel 4, token 3"]
    assert texts_of(axes)[0] == "-2,000 ± 100.0"
    still = VariationTable(2, (Variation("top 1", 0, 7, 3000.0, 0.0), rows[1]))
    assert rendered(plots.variation_table(still)).axes[0].get_xscale() == "linear"


def test_tokens_that_carry():
    rows = [Carrier(7, i, f" w$rd{i}", (i, i), 100 - i, -1000.0 - i) for i in range(30)]
    table = CarrierTable(1, (Carrier(9, 99, "\n", (3, 8), 200, 500.0), *rows))
    (axes,) = rendered(plots.carriers(table)).axes
    assert names_of(axes)[:2] == ["↵  (channel 9)", r"␣w\$rd0  (channel 7)"]
    assert dots_of(axes)[0] == [500, 0]
    assert texts_of(axes)[1] == "-1,000, 100 x"
    assert len(dots_of(axes)) == 16
    assert "and 15 more" in axes.get_title()
    assert len({tuple(colour) for colour in axes.collections[0].get_facecolors().tolist()}) == 2
    assert not overlapping(axes)
    with pytest.raises(BadOption, match="block 1 meets the definition"):
        plots.carriers(CarrierTable(1, ()))


def test_interventions_with_what_is_infinite():
    rows = (("original", 5.47, 0.69), ("set_zero", math.inf, 0.37), ("set_mean", 5.48, 0.69))
    table = Comparison(
        tuple(Row(None, label, {"perplexity": p, "top1": a}) for label, p, a in rows)
    )
    losses, shares = rendered(plots.interventions(table)).axes
    assert texts_of(losses) == ["5.470", "inf", "5.480"]
    assert dots_of(losses)[1][0] > 5.48
    assert [x for x, _ in dots_of(shares)] == pytest.approx([69, 37, 69])
    assert shares.get_xlabel() == "top1 (%)"
    assert names_of(losses) == ["original", "set_zero", "set_mean"]
    broken = Comparison(
        tuple(Row(None, row[0], {"perplexity": 5.0 * 100**i}) for i, row in enumerate(rows))
    )
    assert rendered(plots.interventions(broken)).axes[0].get_xscale() == "log"


def test_channels_by_largest_and_usual_value():
    channels = (
        Channel(0, 5.0, 1, 1.0, 0.0, 0, False),
        Channel(1, 40.0, 1, 20.0, 0.9, 0, True),
        Channel(2, 9000.0, 2, 0.5, 0.01, 12, False),
        Channel(3, 0.0, 0, 0.0, 0.0, 0, False),
    )
    (axes,) = rendered(plots.outlier_features(ChannelTable(channels, 6.0, 100))).axes
    others, outliers, massive = axes.collections
    assert others.get_offsets().tolist() == [[1.0, 5.0]]
    assert outliers.get_offsets().tolist() == [[20.0, 40.0]]
    assert massive.get_offsets().tolist() == [[0.5, 9000.0]]
    assert texts_of(axes) == ["2"]
    with pytest.raises(BadOption, match="all of its channels are zero"):
        plots.outlier_features(ChannelTable(channels[3:], 6.0, 100))


@pytest.fixture(scope="module")
def model():
    return models.planted("llama")


def test_the_life_of_a_value(model):
    ids = models.tokens()
    life = bs.evaluate.value_life(model, [ids], bs.diagnose(model, [ids]))
    values, attention = rendered(plots.value_life(life)).axes
    carrying = next(line for line in values.lines if "elsewhere" in line.get_label())
    wanted = [[block.layer, abs(block.value)] for block in life.blocks]
    assert carrying.get_xydata().tolist() == wanted
    by_name = {line.get_label(): line for line in attention.lines}
    wanted = [100 * block.attention for block in life.blocks]
    assert by_name["mean over heads"].get_ydata().tolist() == pytest.approx(wanted)
    words = " ".join(text.get_text() for text in values.get_legend().get_texts())
    assert life.weights[0].place in words


def test_the_life_of_a_value_that_nothing_attends_to():
    blocks = (
        LifeInBlock(0, 0.0, 0.0, 1.0, None, None),
        LifeInBlock(1, 500.0, 1.0, 1.0, None, None),
    )
    life = ValueLife(Site(1, 7, "start", 500.0), (), blocks, 3, 3)
    (axes,) = rendered(plots.value_life(life)).axes
    assert axes.get_yscale() == "symlog"


def test_what_sinks_do():
    kinds = ("no sink", "nop", "broadcast", "mixed")
    heads = tuple(
        HeadSinks(layer, head, 0.1 + 0.2 * head, 0.1 * (head + 1), 1.0, 1.0, 4.0, None, kind)
        for layer in (1, 3)
        for head, kind in enumerate(kinds)
    )
    figure = rendered(plots.sink_kinds(SinkKinds(heads, 0.3, 0.25, 1.5, 2, 9)))
    cells, points = figure.axes
    assert cells.images[0].get_array().tolist() == [[0, 1, 2, 3]] * 2
    assert names_of(cells) == ["1", "3"]
    for place, (kind, dots) in enumerate(zip(kinds, points.collections)):
        wanted = [0.1 * (place + 1), 100 * (0.1 + 0.2 * place)]
        assert dots.get_offsets().tolist() == [pytest.approx(wanted)] * 2
        assert dots.get_label() == f"{kind} (2)"


def test_a_hundred_layers_are_drawn_not_refused():
    heads = tuple(
        HeadSinks(layer, head, 0.5, 0.1, 1.0, 1.0, 4.0, 1.0, "nop")
        for layer in range(120)
        for head in range(96)
    )
    cells, _ = rendered(plots.sink_kinds(SinkKinds(heads, 0.3, 0.25, 1.5, 2, 9))).axes
    assert cells.images[0].get_array().shape == (120, 96)
    assert not overlapping(cells)


def test_a_long_sequence_is_drawn(model):
    long = torch.cat([models.tokens(rows=1), models.tokens(rows=1, length=200)], 1)
    tables = bs.evaluate.hidden_state_tables(model, [long, long])
    assert len(dots_of(rendered(plots.variation_table(tables.variation)).axes[0])) >= 5


def test_training_curves():
    runs = json.loads((RESULTS / "backcopy_curves.json").read_text())
    magnitudes, losses = rendered(plots.training_curves(runs)).axes
    for place, (name, rows) in enumerate(runs.items()):
        line = losses.lines[place]
        assert line.get_label() == name
        assert line.get_xydata().tolist() == [[row["step"], row["loss"]] for row in rows]
        assert magnitudes.lines[2 * place].get_ydata().tolist() == [row["top_1"] for row in rows]
        assert magnitudes.lines[2 * place + 1].get_ydata().tolist() == [r["median"] for r in rows]
    assert magnitudes.get_yscale() == "log"
    for wrong, match in (
        ({}, "runs: 0"),
        ({"a": []}, "'a' has 0 rows"),
        ({"a": [{"step": 1}]}, "loss"),
    ):
        with pytest.raises(BadOption, match=match):
            plots.training_curves(wrong)


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_files_of_every_kind(tmp_path, kind):
    table = MagnitudeTable(0, (RankedMagnitude("top 1", 3.0), RankedMagnitude("median", 1.0)))
    plots.magnitude_table(table).savefig(tmp_path / f"t.{kind}")
    assert (tmp_path / f"t.{kind}").stat().st_size > 1000


def test_an_id_without_a_token_has_a_label():
    (axes,) = rendered(plots.activations_3d(torch.rand(2, 9), tokens=["Ġa", None])).axes
    assert names_of(axes) == ["␣a", "?"]
