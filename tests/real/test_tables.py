"""The paper's tables on SmolLM2: the numbers that docs/real.md states, and plain computations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import biassurgery as bs
from biassurgery.measure.hidden_state import magnitude_table, variation_table
from tests.real import plain
from tests.real.conftest import Real

BLOCK = 11  # where SmolLM2's massive activations are born
CHANNEL = 507
SECOND = 247


def test_where_they_are_born_and_how_large(smollm2: Real, smollm2_sites: bs.Sites) -> None:
    born = [site for site in smollm2_sites if site.first]
    assert {(site.layer, site.channel, site.role) for site in born} == {
        (BLOCK, SECOND, "start"),
        (BLOCK, CHANNEL, "start"),
    }
    second, first = sorted(born, key=lambda site: site.mean)
    assert first.mean == pytest.approx(23_600, rel=0.03)
    assert second.mean == pytest.approx(1_722, rel=0.03)
    assert first.margin is not None
    assert first.margin > 50
    layers = [site.layer for site in smollm2_sites if site.channel == CHANNEL]
    assert layers == list(range(BLOCK, 28))
    with torch.no_grad():
        states = smollm2.model(smollm2.calibration[:2], output_hidden_states=True).hidden_states
    start = states[BLOCK + 1][:, 0, CHANNEL]
    assert ((start - first.mean).abs() < 4 * first.std).all()
    assert states[BLOCK][:, :, CHANNEL].abs().max() < 1000  # one block before
    assert states[BLOCK + 1][:, 1:, CHANNEL].abs().max() < first.mean / 50


def test_table_3(smollm2: Real, smollm2_sites: bs.Sites) -> None:
    """Zeroed at one token it is the end of the model; its mean is as good as itself."""
    ids = smollm2.evaluation[:2]
    table = bs.compare(
        smollm2.model,
        lambda model: bs.perplexity(model, ids),
        [None, "set_zero", "set_mean", "zero_random"],
        sites=smollm2_sites,
    )
    original = plain.perplexity(smollm2.model, ids)
    assert table["original"] == pytest.approx(original, rel=1e-4)
    with plain.writing(smollm2.model, BLOCK, {CHANNEL: 0.0, SECOND: 0.0}):
        assert table["set_zero"] == pytest.approx(plain.perplexity(smollm2.model, ids), rel=1e-3)
    means = {site.channel: site.mean for site in smollm2_sites if site.first}
    with plain.writing(smollm2.model, BLOCK, means):
        assert table["set_mean"] == pytest.approx(plain.perplexity(smollm2.model, ids), rel=1e-4)
    assert table["set_zero"] > 1e4 * original
    assert table["set_mean"] == pytest.approx(original, rel=0.01)
    assert table["zero_random"] == pytest.approx(original, rel=0.01)
    assert table["zero_random"] != original


@pytest.mark.long
def test_table_3_is_that_of_the_documentation(smollm2: Real, smollm2_sites: bs.Sites) -> None:
    ids = smollm2.evaluation[:8]
    table = bs.compare(
        smollm2.model,
        lambda model: bs.perplexity(model, ids),
        [None, "set_zero", "set_mean", "zero_random"],
        sites=smollm2_sites,
    )
    assert table["original"] == pytest.approx(30.04, rel=0.002)
    assert table["set_zero"] == pytest.approx(2_119_535, rel=0.05)
    assert table["set_mean"] == pytest.approx(29.92, rel=0.005)
    assert table["zero_random"] == pytest.approx(30.02, rel=0.005)


def test_tables_1_and_2(smollm2: Real) -> None:
    ids = smollm2.calibration[:4]
    with torch.no_grad(), bs.record(smollm2.model, "block_output", [BLOCK]) as rec:
        smollm2.model(ids, use_cache=False)
    hidden = rec["block_output"][BLOCK]
    with torch.no_grad():
        states = smollm2.model(ids[:1], output_hidden_states=True, use_cache=False).hidden_states
    assert (
        torch.equal(hidden[:1], states[BLOCK + 1])
        or plain.relative(hidden[:1], states[BLOCK + 1]) < 1e-6
    )
    magnitudes = magnitude_table(hidden, BLOCK)
    assert magnitudes["top 1"] == pytest.approx(23_500, rel=0.05)
    assert magnitudes["top 2"] == pytest.approx(1_722, rel=0.05)
    assert magnitudes["median"] == pytest.approx(1.69, rel=0.05)
    assert magnitudes["top 1"] > 10_000 * magnitudes["median"]
    assert magnitudes["top 1 %"] < 30
    variation = variation_table(hidden, BLOCK)
    for rank, channel in (("top 1", CHANNEL), ("top 2", SECOND)):
        place = variation[rank]
        assert (place.token, place.channel) == (0, channel)
        assert place.variance**0.5 < 0.07 * abs(place.mean)
    for rank in ("top 10 %", "median"):
        assert variation[rank].variance ** 0.5 > 0.5 * abs(variation[rank].mean)


def test_sinks_begin_behind_the_block_where_they_are_born(smollm2: Real) -> None:
    ids = smollm2.calibration[:1]
    found = bs.detect(smollm2.model, ids).sinks
    assert found is not None
    implementation = smollm2.model.config._attn_implementation
    smollm2.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attentions = smollm2.model(ids, output_attentions=True, use_cache=False).attentions
    finally:
        smollm2.model.set_attn_implementation(implementation)
    for layer in (BLOCK, BLOCK + 1):
        wanted = attentions[layer][0, :, 1:, 0].mean(1)
        assert found.layers[layer].attention == pytest.approx(wanted.tolist(), abs=1e-4)
    means = [sum(row.attention) / len(row.attention) for row in found.layers]
    assert means[BLOCK] < 0.02
    assert means[BLOCK + 1] > 0.3


@pytest.mark.long
def test_gemma3_needs_its_values_too(gemma3: Real, gemma3_sites: bs.Sites) -> None:
    """By default every block where they grow is changed: zero costs, mean and control do not."""
    ids = gemma3.evaluation[:4]
    table = bs.compare(
        gemma3.model,
        lambda model: bs.perplexity(model, ids),
        [None, "set_zero", "set_mean", "zero_random"],
        sites=gemma3_sites,
    )
    original = plain.perplexity(gemma3.model, ids)
    assert table["original"] == pytest.approx(original, rel=1e-4)
    assert table["set_zero"] > 3 * original
    assert table["set_mean"] == pytest.approx(original, rel=0.02)
    assert table["zero_random"] == pytest.approx(original, rel=0.02)
    largest = max(gemma3_sites, key=lambda site: abs(site.mean))
    assert (largest.channel, largest.role) == (163, "start")
    assert largest.mean == pytest.approx(104_000, rel=0.02)


def test_undone_bit_by_bit(smollm2: Real, smollm2_sites: bs.Sites) -> None:
    ids = smollm2.evaluation[:1, :32]
    before = plain.logits(smollm2.model, ids)
    keys = list(smollm2.model.state_dict())
    bs.patch_model(smollm2.model, "set_zero", sites=smollm2_sites)
    assert plain.relative(plain.logits(smollm2.model, ids), before) > 0.1
    assert list(smollm2.model.state_dict()) == keys
    bs.unpatch_model(smollm2.model)
    assert torch.equal(plain.logits(smollm2.model, ids), before)
    half = [replace(site, mean=site.mean / 2) for site in smollm2_sites if site.first]
    with bs.patched(smollm2.model, "set_mean", sites=half):
        assert not torch.equal(plain.logits(smollm2.model, ids), before)
    assert torch.equal(plain.logits(smollm2.model, ids), before)
