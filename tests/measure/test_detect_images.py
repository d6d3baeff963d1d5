"""`detect` on images: where on the image a position is, and when a channel has no site."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import biassurgery as bs
from biassurgery.cli import app
from biassurgery.findings.grid import patch_grid
from biassurgery.findings.tally import Tally
from tests.measure.image_states import hidden_states
from tests.models import (
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
from tests.photographs import paint

SIDE = IMAGE // 7
IMAGE_ROLES = ("cls", "patch")
TEXT_ROLES = ("start", "elsewhere")


# -- where a position is


@pytest.mark.parametrize("patch", [7, 14, 16, 32])
@pytest.mark.parametrize(
    ("height", "width"), [(224, 224), (224, 336), (518, 224), (225, 480), (101, 447)]
)
def test_a_grid_is_that_of_a_strided_convolution(height, width, patch):
    conv = nn.Conv2d(1, 1, patch, patch)
    image = torch.zeros(1, 1, height, width)
    rows, columns = conv(image).shape[-2:]
    assert patch_grid((height, width), rows * columns) == (rows, columns)
    padded = nn.functional.pad(image, (0, -width % patch, 0, -height % patch))
    rows, columns = conv(padded).shape[-2:]
    assert patch_grid((height, width), rows * columns) == (rows, columns)


def test_a_number_of_patches_that_no_grid_has():
    assert patch_grid((224, 224), 197) is None  # a prefix token too many
    assert patch_grid((224, 336), 195) is None


def test_positions_are_roles_and_places_on_the_grid():
    model = planted_vit(reg_tokens=2)
    with torch.no_grad():
        model.cls_token[0, 0, KEYS[START_ID]] = 4.0
        model.reg_token[0, 1, KEYS[START_ID]] = 4.0
    found = bs.detect(model, [images(6)])
    assert found.grid == (SIDE, SIDE)
    here = {(p.position, p.token, p.patch): p.count for p in found.positions if p.layer == LAYER}
    patches = {(3 + patch, "patch", divmod(patch, SIDE)): 6 for patch in PATCHES}
    assert here == {(0, "cls", None): 6, (2, "register:1", None): 6, **patches}
    text = str(found)
    assert "(row, column) of a patch (values)" in text
    assert "cls (6), register:1 (6), (0, 0) (6), (0, 3) (6), (3, 0) (6)" in text


def test_images_that_are_no_squares_and_images_of_several_sizes():
    model = planted_vit(dynamic_img_size=True)
    wide = torch.randn(4, 3, 28, 42, generator=torch.Generator().manual_seed(3))
    found = bs.detect(model, [wide])
    assert found.grid == (4, 6)
    counts = {}
    (gate,) = {(site.channel, site.gate) for site in found.sites.at(LAYER)}
    for sequence in hidden_states(model, wide)[LAYER]:
        massive = sequence[:, gate[0]].abs() > gate[1]
        for token in massive.nonzero()[:, 0].tolist():
            row = (token - 1) // 6
            column = (token - 1) % 6
            counts[row, column] = counts.get((row, column), 0) + 1
    assert counts
    assert {p.patch: p.count for p in found.positions if p.layer == LAYER} == counts
    mixed = bs.detect(model, [wide, images(4)])
    assert mixed.grid is None
    assert {p.patch for p in mixed.positions} == {None}
    assert {p.token for p in mixed.positions} == {"patch"}
    assert "position (values)" in str(mixed)


def test_a_batch_that_drops_patches_has_no_grid():
    from biassurgery.findings.grid import grid_of_batch

    pixels = torch.zeros(1, 3, 224, 224)
    assert grid_of_batch({"pixel_values": pixels}, IMAGE_ROLES, 197) == (14, 14)
    assert (
        grid_of_batch({"pixel_values": pixels, "noise": torch.zeros(1, 196)}, IMAGE_ROLES, 50)
        is None
    )


def test_positions_in_text_have_no_place():
    found = bs.detect(planted("llama"), [tokens()])
    assert found.grid is None
    assert {(p.token, p.patch) for p in found.positions} == {(None, None)}


def test_the_command_line_tells_the_places(tmp_path):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("test_vit")
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    for shade in range(3):
        paint(tmp_path / f"{shade}.png", 60 * shade)
    result = CliRunner().invoke(
        app,
        [
            "detect",
            "test_vit",
            "--weights",
            str(tmp_path / "vit.safetensors"),
            "--images",
            str(tmp_path),
            "--device",
            "cpu",
            "--min-magnitude",
            "0",
            "--min-ratio",
            "4",
            "--json",
        ],
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    rows, columns = model.patch_embed.grid_size
    assert found["grid"] == [rows, columns]
    assert found["uniform_channels"] == []
    places = {(p["position"], p["token"], tuple(p["patch"] or ())) for p in found["positions"]}
    assert len(places) > 3
    assert all(
        place == ((1 + row * columns + column), "patch", (row, column))
        for place in places
        if place[1] == "patch"
        for row, column in [place[2]]
    )
    assert {place for place in places if place[1] != "patch"} <= {(0, "cls", ())}


# -- the majority rule, on tallies


def tally_of(massive, tokens, role=1):
    """One layer, one channel, in which `massive` of `tokens` values are 3000 and the others are
    small.
    """
    tally = Tally.empty(1, 1)
    value = torch.full((massive,), 3000.0, dtype=torch.float64)
    key = tally.key(0, torch.zeros(massive).long(), torch.full((massive,), role), 2, value)
    tally = tally.with_values(key, value, torch.ones(massive, dtype=torch.bool))
    return tally.with_totals(torch.ones(1, 1), torch.ones(1).double(), 1, tokens)


def sites_of(tally, roles=IMAGE_ROLES):
    return bs.Sites.from_tally(tally, bs.Origin(roles=roles))


@pytest.mark.parametrize(("massive", "sites"), [(1, 1), (10, 1), (11, 0), (20, 0)])
def test_more_than_half_of_the_tokens_of_images_is_no_site(massive, sites):
    found = sites_of(tally_of(massive, 20))
    assert len(found) == sites
    assert found.widespread() == (set() if sites else {(0, 0)})


def test_a_sum_is_decided_by_its_whole():
    parts = [tally_of(18, 20), tally_of(1, 20), tally_of(3, 20)]
    assert [len(sites_of(part)) for part in parts] == [0, 1, 1]
    for order in itertools.permutations(map(sites_of, parts)):
        whole = order[0] + order[1] + order[2]
        assert [site.count for site in whole] == [22]  # of 60
        assert whole.widespread() == set()
        assert [site.count for site in order[0] + order[0]] == (
            [] if order[0].widespread() else [2 * order[0][0].count]
        )
    assert (sites_of(parts[0]) + sites_of(parts[1])).widespread() == set()  # 19 of 40
    assert len(sites_of(parts[0]) + sites_of(tally_of(6, 20))) == 0  # 24 of 40


def test_the_decision_survives_a_file(tmp_path):
    sites_of(tally_of(18, 20)).save(tmp_path / "sites.safetensors")
    loaded = bs.Sites.load(tmp_path / "sites.safetensors")
    assert (len(loaded), loaded.widespread()) == (0, {(0, 0)})
    assert [site.count for site in loaded + sites_of(tally_of(1, 20))] == [19]


def test_text_of_start_tokens_alone_has_sites():
    """Every token is massive: sequences of one token, as in decoding, and of a start token and a
    delimiter.
    """
    assert len(sites_of(tally_of(20, 20, role=0), TEXT_ROLES)) == 1
    model = planted("llama")
    ids = tokens(rows=5, length=2, delimiter_at=1)
    for length, roles in ((1, {"start"}), (2, {"start", "elsewhere"})):
        found = bs.detect(model, [ids[:, :length]])
        assert {(s.layer, s.role, s.count) for s in found.sites} == {
            (layer, role, 5) for layer in range(LAYER, LAYERS) for role in roles
        }
        assert [s.massive_tokens for s in found.sinks.layers] == [0] * (LAYER + 1) + [
            5 * length
        ] * (LAYERS - LAYER - 1)
        assert {p.position for p in found.positions if p.layer == LAYER} == set(range(length))
        assert found.sites == bs.calibrate(model, [ids[:, :length]])
