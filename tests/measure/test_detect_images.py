"""`detect` on images: where on the image a position is, and uniformly large channels, which are no
massive activations.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import biassurgery as bs
from biassurgery.cli import app
from biassurgery.findings.detection import UniformChannel
from biassurgery.findings.grid import patch_grid
from biassurgery.findings.tally import Tally
from biassurgery.measure.statistic import BlockOutput
from biassurgery.measure.uniform import UniformChannels
from tests.models import (
    CHANNEL,
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

SIDE = IMAGE // 7
OTHER = 20  # a channel that is made uniform
IMAGE_ROLES = ("cls", "patch")
TEXT_ROLES = ("start", "elsewhere")


@torch.no_grad()
def hidden_states(model, batch):
    """Every block's output as (B, T, D) float64, caught by hooks."""
    caught = []
    handles = [
        block.register_forward_hook(lambda m, a, out: caught.append(out.double()))
        for block in model.blocks
    ]
    model(batch)
    for handle in handles:
        handle.remove()
    return caught


def median_of(sequence):
    values = sequence.abs().flatten().sort().values
    return values[(len(values) - 1) // 2].item()


def with_bias(model, channel, value, layer=LAYER):
    """Add a constant to a channel of a block's output, at all tokens."""
    with torch.no_grad():
        model.blocks[layer].mlp.fc2.bias[channel] += value
    return model


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
    assert "(row, column) of a patch (count)" in text
    assert "cls (6), register:1 (6), (0, 0) (6), (0, 3) (6), (3, 0) (6)" in text


def test_images_that_are_no_squares_and_images_of_several_sizes():
    model = planted_vit(dynamic_img_size=True)
    wide = torch.randn(4, 3, 28, 42, generator=torch.Generator().manual_seed(3))
    found = bs.detect(model, [wide])
    assert found.grid == (4, 6)
    counts = {}
    for sequence in hidden_states(model, wide)[LAYER]:
        massive = sequence.abs() > max(100, 1000 * median_of(sequence))
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
    assert "position (count)" in str(mixed)


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

    from tests.data.test_loading import paint

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


# -- uniform channels


def expected_uniform(model, batch):
    """(layer, channel) -> (mean magnitude, that over the mean median, share of tokens beyond 10
    medians) where that share is 95 %.
    """
    found = {}
    for layer, states in enumerate(hidden_states(model, batch)):
        medians = torch.tensor([median_of(sequence) for sequence in states], dtype=torch.float64)
        share = (states.abs() > 10 * medians[:, None, None]).double().mean((0, 1))
        mean = states.abs().mean((0, 1))
        for channel in (share >= 0.95).nonzero()[:, 0].tolist():
            found[layer, channel] = (
                mean[channel].item(),
                (mean[channel] / medians.mean()).item(),
                share[channel].item(),
            )
    return found


def told(found):
    return {(u.layer, u.channel): (u.magnitude, u.ratio, u.share) for u in found.uniform_channels}


def assert_uniform(found, wanted):
    assert told(found).keys() == wanted.keys()
    for place, numbers in wanted.items():
        assert told(found)[place] == pytest.approx(numbers, rel=1e-5), place


@pytest.mark.parametrize("value", [60.0, 2500.0])
def test_a_uniform_channel_beside_massive_activations(value):
    """Above the definition or below it: it is reported, it has no site, and everything else is what
    it was without it.
    """
    batch = images(6)
    plain = bs.detect(planted_vit(), [batch])
    assert plain.uniform_channels == ()
    assert "Uniform" not in str(plain)
    model = with_bias(planted_vit(), OTHER, value)
    found = bs.detect(model, [batch])
    wanted = expected_uniform(model, batch)
    assert wanted.keys() == {(layer, OTHER) for layer in range(LAYER, LAYERS)}
    assert_uniform(found, wanted)
    assert "Uniform channels" in str(found)
    assert len(found.sites) == LAYERS - LAYER
    for site, before in zip(found.sites, plain.sites, strict=True):
        assert (site.count, before.count) == (18, 18)
        assert replace(site, mean=0.0, std=0.0, gate=None, margin=None) == replace(
            before, mean=0.0, std=0.0, gate=None, margin=None
        )
        assert (site.mean, site.std) == pytest.approx((before.mean, before.std), rel=1e-5)
    assert (
        found.sites.at(LAYER)[0] == plain.sites.at(LAYER)[0]
    )  # the block itself has not read the constant yet: bitwise
    assert found.positions == plain.positions
    assert found.roles == plain.roles
    assert [s.massive_tokens for s in found.sinks.layers] == [
        s.massive_tokens for s in plain.sinks.layers
    ]
    assert found.sites == bs.calibrate(model, [batch])


def test_massive_activations_on_top_of_a_uniform_channel_keep_their_site():
    batch = images(6)
    model = with_bias(planted_vit(), CHANNEL, 60.0)
    found = bs.detect(model, [batch])
    assert told(found).keys() == {(layer, CHANNEL) for layer in range(LAYER, LAYERS)}
    assert {(s.layer, s.channel, s.role, s.count) for s in found.sites} == {
        (layer, CHANNEL, "patch", 18) for layer in range(LAYER, LAYERS)
    }
    assert found.sites[0].mean == pytest.approx(
        bs.calibrate(planted_vit(), batch)[0].mean + 60, rel=1e-5
    )


def test_a_model_with_nothing_but_a_uniform_channel():
    """The constant in block 0 is all that later layer norms see, so that the planted value does not
    come about.
    """
    model = with_bias(planted_vit(), OTHER, 2500.0, layer=0)
    found = bs.detect(model, [images(6)])
    assert len(found.sites) == 0
    assert found.positions == ()
    assert (0, OTHER) in told(found)
    assert f"the majority of the tokens ({OTHER})" in str(found.sites)
    assert "No massive activations" in str(found)


def one_layer(magnitude, real, median):
    """What one block returns: its magnitudes (B, T, D), and how they count."""
    roles = torch.where(real, 0, -1)
    median = torch.full((len(magnitude),), median)
    return BlockOutput(0, magnitude, magnitude, median, 1000 * median, roles, real)


def uniform_channels(width):
    """The statistic of a model with one block."""
    return UniformChannels(SimpleNamespace(blocks=[None], width=width))


def test_statistics_against_arithmetic():
    """95 % of 20 real tokens are 19, over two batches, one of them padded with zeros."""
    magnitude = torch.full((1, 20, 4), 2.0)
    magnitude[0, :19, 0] = 22.0  # 19 of 20 beyond 10 medians of 2
    magnitude[0, :18, 1] = 22.0
    magnitude[0, :, 2] = 20.0  # not beyond
    parts = [magnitude[:, :12], torch.cat([magnitude[:, 12:], torch.zeros(1, 3, 4)], 1)]
    reals = [torch.ones(1, 12).bool(), torch.arange(11)[None] < 8]
    statistic = uniform_channels(4)
    for part, real in zip(parts, reals):
        statistic.see(one_layer(part, real, 2.0))
    assert statistic.result() == (
        UniformChannel(0, 0, (19 * 22 + 2) / 20, (19 * 22 + 2) / 40, 0.95),
    )
    both = statistic.result({(0, 3)})
    assert both[1:] == (UniformChannel(0, 3, 2.0, 1.0, 0.0),)


def test_statistics_of_half_precision_do_not_overflow():
    statistic = uniform_channels(3)
    magnitude = torch.full((2, 300, 3), 500.0, dtype=torch.float16)
    statistic.see(one_layer(magnitude, torch.ones(2, 300).bool(), 1.0))
    assert [channel.magnitude for channel in statistic.result()] == [500.0] * 3


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
    assert len(sites_of(tally_of(20, 20), TEXT_ROLES)) == 1
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
