"""Figures by what is drawn in them, and the attention of [CLS] against softmaxes written out in
float64.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch

import biassurgery as bs
from biassurgery import plots
from tests.models import (
    CHANNEL,
    HEADS,
    IMAGE,
    KEYS,
    LAYER,
    LAYERS,
    PATCHES,
    START_ID,
    images,
    planted,
    planted_vit,
    tokens,
)
from tests.state import untouched
from tests.written_out_attention import Dense, dense

pytest.importorskip("matplotlib", reason="needs matplotlib (the report extra)")

SIDE = IMAGE // 7
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


def rendered(figure):
    """The figure, after it has been drawn in full."""
    figure.savefig(stream := BytesIO(), format="png")
    assert stream.getvalue().startswith(b"\x89PNG")
    return figure


# -- the attention of [CLS]


@pytest.mark.parametrize("layer", [-1, 0, 2, -LAYERS])
@pytest.mark.parametrize("registers", [0, 2])
def test_the_attention_of_cls_is_the_first_row(layer, registers):
    model = planted_vit(reg_tokens=registers)
    batch = images(3)
    with untouched(model, batch):
        found = bs.cls_attention(model, batch, layer)
    assert (found.shape, found.dtype) == ((3, HEADS, 1 + registers + SIDE**2), torch.float32)
    torch.testing.assert_close(
        found.double(), dense(model, batch)[layer].probs[:, :, 0], rtol=1e-4, atol=1e-6
    )
    assert torch.equal(
        bs.cls_attention(model, [batch[:2], (batch[2:], torch.zeros(1))], layer)[:2], found[:2]
    )


def test_patches_and_explicit_biases_are_part_of_it():
    model = planted_vit()
    batch = images(2)
    before = bs.cls_attention(model, batch)
    with bs.patched(model, "set_zero", sites=bs.calibrate(model, batch)):
        assert not torch.allclose(bs.cls_attention(model, batch), before, atol=1e-3)
    bs.patch_model(model, "attention_bias", init="normal")
    with bs.record(model, ("bias_mass", "probs"), layers=[1]) as seen, torch.no_grad():
        model(batch)
    found = bs.cls_attention(model, batch, 1)
    torch.testing.assert_close(found, seen["probs"][1][:, :, 0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        found.sum(-1), 1 - seen["bias_mass"][1][:, :, 0], rtol=1e-4, atol=1e-6
    )
    assert (found.sum(-1) < 0.999).all()


def test_attention_by_role_is_a_mean_over_images_and_heads():
    model = planted_vit(reg_tokens=2, dynamic_img_size=True).train()
    batches = [images(3), torch.randn(1, 3, 28, 42)]
    with untouched(model):
        found = bs.attention_by_role(model, batches, 2)
    rows = []
    for batch in batches:
        with Dense() as seen, torch.no_grad():
            model.eval()(batch)
        for row in seen.calls[2].probs[:, :, 0].mean(1):
            rows.append([row[0], row[1], row[2], row[3:].sum()])
    wanted = torch.tensor(rows, dtype=torch.float64).mean(0)
    assert list(found) == ["cls", "register:0", "register:1", "patch"]
    assert list(found.values()) == pytest.approx(wanted.tolist(), rel=1e-5)
    assert sum(found.values()) == pytest.approx(1)


def test_models_and_layers_without_such_an_attention():
    with pytest.raises(bs.UnsupportedModel, match=r"no \[CLS\]"):
        bs.cls_attention(planted_vit(class_token=False, global_pool="avg"), images(1))
    with pytest.raises(bs.UnsupportedModel, match=r"no \[CLS\]"):
        bs.attention_by_role(planted("llama"), tokens())
    for layer in (LAYERS, -LAYERS - 1):
        with pytest.raises(bs.LayerOutOfRange, match=f"layer: {layer}"):
            bs.cls_attention(planted_vit(), images(1), layer)
    model = planted_vit()
    with untouched(model, images(1)), pytest.raises(bs.BadBatch):
        bs.cls_attention(model, [images(1), torch.zeros(2, 3)])


# -- on an image


@pytest.fixture(scope="module")
def detection():
    """Planted patches, and [CLS]."""
    model = planted_vit()
    with torch.no_grad():
        model.cls_token[0, 0, KEYS[START_ID]] = 4.0
    return bs.detect(model, [images(6)])


def test_massive_positions_are_marked_on_their_patches(detection):
    figure = rendered(plots.massive_positions(detection, images(1)[0]))
    (axes,) = figure.axes
    (image,) = axes.images
    assert image.get_extent() == [0, SIDE, SIDE, 0]
    assert image.get_array().shape == (IMAGE, IMAGE, 3)
    assert (image.get_array().min(), image.get_array().max()) == (0, 1)
    corners = {
        (
            box.get_xy()[:, 1].min(),
            box.get_xy()[:, 0].min(),
            box.get_xy()[:, 1].max(),
            box.get_xy()[:, 0].max(),
        )
        for box in axes.patches
    }
    assert corners == {
        (row, column, row + 1, column + 1)
        for row, column in (divmod(patch, SIDE) for patch in PATCHES)
    }
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {
        ((column + 0.5, row + 0.5), "6")
        for row, column in (divmod(patch, SIDE) for patch in PATCHES)
    }
    assert [len(lines.get_segments()) for lines in axes.collections] == [SIDE - 1, SIDE - 1]
    assert f"block {LAYER}" in axes.get_title()
    assert "over 6 images" in axes.get_title()
    assert "cls 6" in axes.get_xlabel()
    assert (
        f"block {LAYER + 2}"
        in plots.massive_positions(detection, images(1)[0], layer=LAYER + 2).axes[0].get_title()
    )


def test_massive_positions_on_a_photograph(detection):
    from PIL import Image

    photograph = Image.new("L", (2 * IMAGE, 2 * IMAGE), 51)
    (image,) = plots.massive_positions(detection, photograph).axes[0].images
    assert image.get_array().shape == (2 * IMAGE, 2 * IMAGE, 3)
    assert torch.tensor(image.get_array()).unique().tolist() == pytest.approx([0.2])


def test_massive_positions_that_cannot_be_drawn(detection):
    image = images(1)[0]
    for wrong in (image[None], image[0], "photo.jpg"):
        with pytest.raises(bs.BadOption, match="image:"):
            plots.massive_positions(detection, wrong)
    with pytest.raises(bs.BadOption, match="28 x 56 pixels are not cut into 4 x 4 patches"):
        plots.massive_positions(detection, torch.cat([image, image], 2))
    with pytest.raises(bs.BadOption, match=r"layer: 0; .* \[1, 2, 3, 4\]"):
        plots.massive_positions(detection, image, layer=0)
    with pytest.raises(bs.BadOption, match="detection: nothing"):
        plots.massive_positions(replace(detection, positions=()), image)
    with pytest.raises(bs.BadOption, match="detection:"):
        plots.massive_positions(bs.detect(planted("llama"), tokens()), image)


def test_attention_maps_have_a_panel_each_on_one_scale():
    generator = torch.Generator().manual_seed(0)
    maps = {
        name: torch.rand(2, HEADS, 2 + 24, generator=generator) for name in ("original", "set_mean")
    }
    wide = torch.rand(2, 3, 28, 42, generator=generator)
    figure = rendered(plots.attention_maps(maps, wide, prefix=2))
    panels = figure.axes[:6]
    bars = figure.axes[6:]
    assert [axes.get_title() for axes in panels] == ["", "original", "set_mean", "", "", ""]
    assert [bar.get_ylabel() for bar in bars] == ["share of [CLS]'s attention"] * 2
    for row in range(2):
        shown, *drawn = (axes.images[0] for axes in panels[3 * row : 3 * row + 3])
        assert shown.get_array().shape == (28, 42, 3)
        wanted = [share[row].mean(0)[2:].view(4, 6) for share in maps.values()]
        for image, values, axes in zip(drawn, wanted, panels[3 * row + 1 :]):
            assert torch.equal(torch.tensor(image.get_array()), values)
            assert image.get_clim() == (0, pytest.approx(max(each.max().item() for each in wanted)))
            assert axes.get_xlabel() == f"on patches: {100 * values.sum():.0f} %"


def test_attention_maps_without_an_image_are_squares():
    attention = torch.rand(HEADS, 1 + SIDE**2)
    figure = plots.attention_maps({"original": attention})
    (image,) = figure.axes[0].images
    assert torch.equal(torch.tensor(image.get_array()), attention.mean(0)[1:].view(SIDE, SIDE))


def test_attention_maps_that_cannot_be_drawn():
    maps = {"original": torch.rand(2, HEADS, 1 + SIDE**2)}
    image = images(2)
    for arguments, prefix, match in (
        ({"maps": {}}, 1, "maps: none"),
        ({"maps": {**maps, "other": torch.rand(HEADS, 17)}}, 1, "maps: "),
        ({"maps": {"flat": torch.rand(17)}}, 1, "maps: 'flat'"),
        ({"maps": maps}, 0, "prefix: 0 leaves 17"),
        ({"maps": maps}, 17, "maps: 'original' .* prefix is 17"),
        (
            {"maps": maps, "image": image},
            2,
            "prefix: 2 leaves 15 patches, which are no grid on 28 x 28",
        ),
        ({"maps": maps, "image": image[0]}, 1, "image: 1 for the attention of 2"),
    ):
        with pytest.raises(bs.BadOption, match=match):
            plots.attention_maps(**arguments, prefix=prefix)


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
    assert axes.get_xticks().tolist() == [
        415,
        533,
    ]  # 537 would be written over it, and no other stands out


def test_activations_that_cannot_be_drawn():
    for shape, options, match in (
        ((1, 2, 3), {}, "hidden: shape"),
        ((0, 3), {}, "hidden: shape"),
        ((2, 3), {"points": 0}, "points=0"),
        ((2, 3), {"tokens": ["a"]}, "tokens: 1 labels"),
    ):
        with pytest.raises(bs.BadOption, match=match):
            plots.activations_3d(torch.zeros(shape), **options)


# -- registers


def test_register_attention_is_a_bar_for_each_role():
    shares = {"cls": 0.05, "register:0": 0.15, "register:1": 0.6, "patch": 0.2}
    (axes,) = rendered(plots.register_attention(shares)).axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([5, 15, 60, 20])
    assert [label.get_text() for label in axes.get_xticklabels()] == list(shares)
    assert [text.get_text() for text in axes.texts] == ["5.0", "15.0", "60.0", "20.0"]


def test_register_means_are_those_of_the_layer_with_the_largest():
    values = torch.rand(3, 2, 50)
    values[1, 1, 30] = -500.0
    means = bs.RegisterMeans(values)
    for layer, shown in ((None, 1), (2, 2)):
        (axes,) = rendered(plots.register_means(means, layer)).axes
        assert axes.get_title() == f"register means at the input of block {shown}"
        assert [label.get_text() for label in axes.get_yticklabels()] == [
            "register:0",
            "register:1",
        ]
        for register, line in enumerate(axes.lines):
            assert torch.equal(torch.tensor(line.get_data_3d()[2]), values[shown, register].abs())
    with pytest.raises(bs.BadOption, match="layer: 3"):
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
    ):
        with pytest.raises(bs.MissingPackage, match=r"biassurgery\[report\]"):
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
