"""Uniformly large channels, which are no massive activations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import biassurgery as bs
from biassurgery.measure.uniform import UniformChannel, UniformStatistics
from tests.measure.image_states import hidden_states, median_of
from tests.models import (
    CHANNEL,
    LAYER,
    LAYERS,
    images,
    planted_vit,
)

OTHER = 20  # a channel that is made uniform


def with_bias(model, channel, value, layer=LAYER):
    """Add a constant to a channel of a block's output, at all tokens."""
    with torch.no_grad():
        model.blocks[layer].mlp.fc2.bias[channel] += value
    return model


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


def test_statistics_against_arithmetic():
    """95 % of 20 real tokens are 19, over two batches, one of them padded with zeros."""
    magnitude = torch.ones(1, 20, 4)
    magnitude[0, :19, 0] = 11.0  # 19 of 20 beyond 10 medians of 1
    magnitude[0, :18, 1] = 11.0
    magnitude[0, :, 2] = 10.0  # not beyond
    parts = [magnitude[:, :12], torch.cat([magnitude[:, 12:], torch.zeros(1, 3, 4)], 1)]
    statistics = UniformStatistics()
    for part in parts:
        statistics.see(0, part, torch.ones(1))
    assert statistics.result(20, [2.0], ()) == (
        UniformChannel(0, 0, (19 * 11 + 1) / 20, (19 * 11 + 1) / 40, 0.95),
    )
    both = statistics.result(20, [2.0], {(0, 3)})
    assert both[1:] == (UniformChannel(0, 3, 1.0, 0.5, 0.0),)


def test_statistics_of_half_precision_do_not_overflow():
    statistics = UniformStatistics()
    statistics.see(0, torch.full((2, 300, 3), 500.0, dtype=torch.float16), torch.ones(2))
    assert [u.magnitude for u in statistics.result(600, [1.0], ())] == [500.0] * 3
