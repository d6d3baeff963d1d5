"""Figures over images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import biassurgery as bs
from biassurgery import plots
from biassurgery.errors import BadOption
from tests.models import (
    HEADS,
    IMAGE,
    LAYER,
    PATCHES,
    images,
    planted,
    tokens,
)
from tests.plots.drawn import SIDE, rendered

pytest.importorskip("matplotlib", reason="needs matplotlib (the report extra)")


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
        with pytest.raises(BadOption, match="image:"):
            plots.massive_positions(detection, wrong)
    with pytest.raises(BadOption, match="28 x 56 pixels are not cut into 4 x 4 patches"):
        plots.massive_positions(detection, torch.cat([image, image], 2))
    with pytest.raises(BadOption, match=r"layer: 0; .* \[1, 2, 3, 4\]"):
        plots.massive_positions(detection, image, layer=0)
    with pytest.raises(BadOption, match="detection: nothing"):
        plots.massive_positions(replace(detection, positions=()), image)
    with pytest.raises(BadOption, match="detection:"):
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
            every = torch.stack(wanted).flatten().sort().values
            assert image.get_clim() == (pytest.approx(every[0].item()), every[-1].item())
            assert type(image.norm).__name__ == "LogNorm"
            assert axes.get_xlabel() == f"on patches: {100 * values.sum():.0f} %"


def test_attention_maps_without_an_image_are_squares():
    attention = torch.rand(HEADS, 1 + SIDE**2)
    figure = plots.attention_maps({"original": attention})
    (image,) = figure.axes[0].images
    assert torch.equal(torch.tensor(image.get_array()), attention.mean(0)[1:].view(SIDE, SIDE))


def test_attention_maps_beside_a_model_with_one_token_more():
    """Test-time registers add a token: the very comparison."""
    maps = {"original": torch.rand(2, HEADS, 17), "registers": torch.rand(2, HEADS, 18)}
    prefix = {"original": 1, "registers": 2}
    panels = rendered(plots.attention_maps(maps, images(2), prefix=prefix)).axes
    for name, axes in zip(maps, panels[1:3]):
        wanted = maps[name][0].mean(0)[prefix[name] :].view(SIDE, SIDE)
        assert torch.equal(torch.tensor(axes.images[0].get_array()), wanted)
    with pytest.raises(BadOption, match=r"prefix: .* 'registers'"):
        plots.attention_maps(maps, prefix={"original": 1})


def test_attention_maps_of_means_over_heads():
    attention = torch.rand(2, HEADS, 17)
    whole = plots.attention_maps({"original": attention}, images(2)).axes
    for given, shown, rows in (
        (attention.mean(1), images(2), 2),
        (attention[0].mean(0), images(1), 1),
    ):
        panels = plots.attention_maps({"original": given}, shown).axes
        for row in range(rows):
            drawn, wanted = (
                torch.tensor(axes[2 * row + 1].images[0].get_array()) for axes in (panels, whole)
            )
            torch.testing.assert_close(drawn, wanted)


def test_a_sink_does_not_hide_the_other_patches():
    attention = torch.full((1, 17), 0.01)
    attention[0, 5] = 0.84
    attention[0, 9] = 0.02
    (image,) = plots.attention_maps({"original": attention}).axes[0].images
    shades = image.norm(torch.tensor([0.01, 0.02, 0.84]).numpy())
    assert shades[0] == pytest.approx(0, abs=1e-6)
    assert shades[2] == 1
    assert shades[1] > 0.1  # on a linear scale 0.01


def test_attention_maps_that_cannot_be_drawn():
    maps = {"original": torch.rand(2, HEADS, 1 + SIDE**2)}
    image = images(2)
    for arguments, prefix, match in (
        ({"maps": {}}, 1, r"maps: .* none"),
        ({"maps": {**maps, "other": torch.rand(HEADS, 17)}}, 1, "maps: "),
        ({"maps": {"deep": torch.rand(1, 1, 1, 17)}}, 1, "maps: 'deep'"),
        ({"maps": maps}, 0, "prefix: 0 leaves 17"),
        ({"maps": maps}, 17, "maps: 'original' .* prefix is 17"),
        (
            {"maps": maps, "image": image},
            2,
            "prefix: 2 leaves 15 patches, which are no grid on 28 x 28",
        ),
        ({"maps": maps, "image": image[0]}, 1, "image: 1 for the attention of 2"),
    ):
        with pytest.raises(BadOption, match=match):
            plots.attention_maps(**arguments, prefix=prefix)
