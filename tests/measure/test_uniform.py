"""Uniformly large channels, which are no massive activations."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import biassurgery as bs
from biassurgery.findings.detection import UniformChannel
from biassurgery.measure.statistic import BlockOutput
from biassurgery.measure.uniform import UniformChannels
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
