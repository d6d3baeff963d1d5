"""Figures of magnitudes, registers and their means; what plots need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import biassurgery as bs
from biassurgery import plots
from biassurgery.errors import BadOption, MissingPackage
from biassurgery.findings.hidden_state import MagnitudeTable, RankedMagnitude
from tests.models import (
    CHANNEL,
    HEADS,
    images,
    planted_vit,
)
from tests.plots.drawn import rendered
from tests.state import untouched

pytest.importorskip("matplotlib", reason="needs matplotlib (the report extra)")


MEANS = (
    Path(__file__).parents[2]
    / ".."
    / "shared"
    / "data"
    / "dinov2_reg_means"
    / "giant_imagemean_bs10k_trainaug.pt"
)
ABSENT = "the folder `shared` beside the repository, with published register means, is absent"
EXAMPLES = Path(__file__).parents[2] / "examples"


# -- magnitudes


def test_magnitudes_are_lines_over_layers(detection):
    (axes,) = rendered(plots.magnitudes(detection)).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["top 1", "top 2", "top 3", "median"]
    assert axes.get_yscale() == "log"
    for rank in range(3):
        assert lines[f"top {rank + 1}"].get_xydata().tolist() == [
            [s.layer, s.top[rank]] for s in detection.layers
        ]
    assert len({line.get_color() for line in lines.values()}) == 4
    assert len({line.get_marker() for line in lines.values()}) == 4
    assert lines["median"].get_xydata().tolist() == [[s.layer, s.median] for s in detection.layers]
    assert "6 sequences" in axes.get_title()


def test_activations_have_a_line_for_each_token_with_every_channel():
    hidden = torch.randn(5, 40)
    (axes,) = rendered(plots.activations_3d(hidden, title="state")).axes
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel(), axes.get_zlabel()) == (
        "state",
        "channel",
        "token",
        "magnitude",
    )
    assert len(axes.lines) == 5
    for token, line in enumerate(axes.lines):
        channels, at, heights = line.get_data_3d()
        assert list(channels) == list(range(40))
        assert set(at) == {token}
        assert torch.equal(torch.tensor(heights), hidden[token].abs())


def test_thinned_activations_keep_the_largest_where_they_are():
    hidden = torch.rand(3, 1000)
    hidden[1, 415] = -769.0
    hidden[2, 533] = 2000.0
    hidden[2, 537] = 1900.0
    (axes,) = rendered(plots.activations_3d(hidden, tokens=["a", "b", "c"], points=30)).axes
    drawn = [
        dict(zip(line.get_data_3d()[0].tolist(), line.get_data_3d()[2].tolist()))
        for line in axes.lines
    ]
    assert {len(line) for line in drawn} == {30}
    assert drawn[1][415] == 769
    assert drawn[2][533] == 2000
    for line, values in zip(drawn, hidden):
        assert sorted(line) == list(line)
        assert all(values[channel].abs() == height for channel, height in line.items())
        assert list(line.values()) == [run.abs().max().item() for run in values.split(34)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    # 537 would be written over 533, and no other stands out; the ends say where they are.
    assert axes.get_xticks().tolist() == [0, 415, 533, 999]


def test_of_many_tokens_those_that_stand_out_are_named_and_coloured():
    hidden = torch.rand(197, 20)
    for token in (1, 14, 15, 183):
        hidden[token, 7] = -470.0
    names = [f"Ġword{i}" for i in range(197)]
    (axes,) = rendered(plots.activations_3d(hidden, tokens=names, lines=40)).axes
    tokens = [int(line.get_data_3d()[1][0]) for line in axes.lines]
    assert tokens == [
        run.argmax().item() + 5 * i for i, run in enumerate(hidden.abs().amax(1).split(5))
    ]
    marked = {
        t for t, line in zip(tokens, axes.lines) if line.get_color() != axes.lines[1].get_color()
    }
    assert marked == {1, 14, 15, 183}
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "␣word1",
        "␣word14",
        "␣word183",
    ]


def test_activations_that_cannot_be_drawn():
    for shape, options, match in (
        ((1, 2, 3), {}, "hidden: shape"),
        ((0, 3), {}, "hidden: shape"),
        ((2, 3), {"points": 0}, "points=0"),
        ((2, 3), {"lines": 0}, "lines=0"),
        ((2, 3), {"tokens": ["a"]}, "tokens: 1 labels"),
    ):
        with pytest.raises(BadOption, match=match):
            plots.activations_3d(torch.zeros(shape), **options)


# -- registers


def test_register_attention_is_a_bar_for_each_role():
    shares = {"cls": 0.05, "register:0": 0.15, "register:1": 0.6, "patch": 0.2}
    (axes,) = rendered(plots.register_attention(shares)).axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([5, 15, 60, 20])
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names == ["cls", "register 1", "register 2", "patch"]  # the paper counts from 1
    assert [text.get_text() for text in axes.texts] == ["5.0", "15.0", "60.0", "20.0"]


def test_register_means_are_those_of_the_layer_with_the_largest():
    values = torch.rand(3, 2, 50)
    values[1, 1, 30] = -500.0
    means = bs.RegisterMeans(values)
    for layer, shown in ((None, 1), (2, 2)):
        (axes,) = rendered(plots.register_means(means, layer)).axes
        assert axes.get_title() == f"register means at the input of block {shown}"
        assert [label.get_text() for label in axes.get_yticklabels()] == [
            "register 1",
            "register 2",
        ]
        for register, line in enumerate(axes.lines):
            assert torch.equal(torch.tensor(line.get_data_3d()[2]), values[shown, register].abs())
    with pytest.raises(BadOption, match="layer: 3"):
        plots.register_means(means, 3)


@pytest.mark.skipif(not MEANS.is_file(), reason=ABSENT)
def test_register_means_of_the_paper():
    """Figure 14: DINOv2-reg ViT-G, register 3 (index 2), channels 179 and 999."""
    (axes,) = plots.register_means(bs.RegisterMeans.load(MEANS)).axes
    assert {179, 999} <= set(axes.get_xticks())
    channels, _, heights = axes.lines[2].get_data_3d()
    assert channels[heights.argmax()] == 179
    assert heights.max() == max(line.get_data_3d()[2].max() for line in axes.lines)


# -- the library that draws, and the example


def test_a_missing_matplotlib_is_told(monkeypatch, detection):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (
        lambda: plots.magnitudes(detection),
        lambda: plots.massive_positions(detection, images(1)[0]),
        lambda: plots.attention_maps({"original": torch.rand(HEADS, 17)}),
        lambda: plots.activations_3d(torch.rand(2, 3)),
        lambda: plots.register_attention({"cls": 1.0}),
        lambda: plots.register_means(bs.RegisterMeans(torch.rand(1, 1, 4))),
        lambda: plots.magnitude_table(MagnitudeTable(0, (RankedMagnitude("top 1", 1.0),))),
    ):
        with pytest.raises(MissingPackage, match=r"biassurgery\[report\]"):
            draw()


def test_matplotlib_is_imported_late_and_without_pyplot():
    code = (
        "import io, sys, torch, biassurgery\n"
        "assert 'matplotlib' not in sys.modules\n"
        "biassurgery.plots.activations_3d(torch.rand(2, 9)).savefig(io.BytesIO())\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_example_draws_all_of_its_figures(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from vit_massive_activations import draw

    model = planted_vit()
    found = bs.detect(model, images(4))
    with untouched(model, images(2)):
        draw(model, found, images(2), str(tmp_path / "vit"))
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "vit_activations.png",
        "vit_attention.png",
        "vit_magnitudes.png",
        "vit_positions.png",
    ]
    assert {site.channel for site in found.sites} == {CHANNEL}
