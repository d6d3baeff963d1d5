"""A channel that is large at nearly all tokens of texts is a uniform channel, and has no site."""

from __future__ import annotations

import pytest
import torch

import biassurgery as bs
from tests import models
from tests.models import DELIMITER_ID, START_ID
from tests.stepped import outputs, places, standing, stepped

A, UNIFORM = 20, 30
STEPS = {(1, START_ID, A): 3000.0, (1, DELIMITER_ID, A): 9000.0}


def uniform_model(value=1500.0, of=None):
    """`value` in a channel of all tokens, or of those whose ids are given, from the embedding on;
    the start token has five times as much, as in Gemma 3.
    """
    model = stepped(STEPS | {(4, START_ID, UNIFORM): 0.0})
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[slice(None) if of is None else of, UNIFORM] = value
        embedding[START_ID, UNIFORM] = 5 * value
    return model


def data(seed=1, rows=4, length=16):
    return models.tokens(rows, length, seed, delimiter_at=9)


def shares(model, ids):
    """(layer, channel) -> share of the tokens behind the start token that meet the definition."""
    found = {}
    for layer, states in enumerate(outputs(model, ids)):
        magnitudes = states.abs()
        middle = (magnitudes[0].numel() - 1) // 2
        limits = (1000 * magnitudes.flatten(1).sort(1).values[:, middle]).clamp(min=100)
        meets = (magnitudes > limits[:, None, None])[:, 1:].double().mean((0, 1))
        found |= {(layer, channel): meets[channel].item() for channel in range(models.HIDDEN)}
    return found


def test_it_has_no_site_and_is_told_of():
    model = uniform_model()
    ids = data()
    uniform = {place for place, share in shares(model, ids).items() if share > 0.5}
    assert uniform == {(layer, UNIFORM) for layer in range(models.LAYERS)}
    found = bs.detect(model, [ids])
    assert places(found.sites) == {(layer, A) for layer in range(1, models.LAYERS)}
    assert found.sites == bs.calibrate(model, [ids])
    assert found.sites.widespread() == uniform
    assert {(u.layer, u.channel) for u in found.uniform_channels} >= uniform
    rows = [line.split() for line in str(found).splitlines() if f" {UNIFORM} " in line]
    assert rows
    assert all(row[-1] == "%" for row in rows)  # no massive values
    assert sum(role.count for role in found.roles) == sum(site.count for site in found.sites)
    assert {p.position for p in found.positions} == {0, 9}


def test_a_channel_that_is_large_everywhere_and_massive_at_a_few_tokens_is_both():
    """Beyond 10 medians at all tokens, beyond 1000 at the start token: as Gemma's channel 163."""
    model = uniform_model(value=30.0)
    with torch.no_grad():
        model.get_input_embeddings().weight[START_ID, UNIFORM] = 20_000.0
    found = bs.detect(model, [data()])
    both = {(layer, UNIFORM) for layer in range(models.LAYERS)}
    assert both <= places(found.sites)
    uniform = {(u.layer, u.channel) for u in found.uniform_channels}
    assert both & uniform
    start = next(row for row in str(found).splitlines() if f" {UNIFORM} " in row and "%" in row)
    in_channel = [site.count for site in found.sites if site.channel == UNIFORM]
    assert start.split()[-1] == str(sum(in_channel))  # in all layers, which share the row
    assert set(in_channel) == {found.sites.tally.sequences}


def test_the_massive_activations_beside_it_are_what_they_were():
    plain = bs.calibrate(stepped(STEPS), data())
    beside = bs.calibrate(uniform_model(), data())
    assert [(s.layer, s.channel, s.role, s.count, s.first) for s in beside] == [
        (s.layer, s.channel, s.role, s.count, s.first) for s in plain
    ]
    assert [s.mean for s in beside] == pytest.approx([s.mean for s in plain], rel=1e-5)


def test_set_zero_leaves_it():
    model = uniform_model()
    sites = bs.calibrate(model, data())
    ids = data(9)
    with bs.patched(model, "set_zero", sites=sites):
        assert {channel for _, channel, _ in standing(model, ids)} == {UNIFORM}
        after = outputs(model, ids)
    for layer, before in enumerate(outputs(model, ids)):
        assert torch.allclose(after[layer][..., UNIFORM], before[..., UNIFORM])


@pytest.mark.parametrize(("words", "has_sites"), [(40, True), (50, False)])
def test_more_than_half_of_the_tokens_are_most(words, has_sites):
    """Of the 94 words, those with ids below 2 + `words` have it."""
    ids = torch.arange(2, 96).repeat(3, 1)
    ids = torch.cat([torch.full((3, 1), START_ID), ids], 1)
    model = uniform_model(of=slice(2, 2 + words))
    sites = bs.calibrate(model, ids)
    assert ((0, UNIFORM) in places(sites)) == has_sites
    assert (sites.widespread() == set()) == has_sites


@pytest.mark.parametrize("length", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 6])
def test_short_sequences_of_start_tokens_and_delimiters_keep_their_sites(rows, length):
    model = stepped(STEPS)
    ids = models.tokens(rows, length, 1, None)
    ids[:, 1:] = DELIMITER_ID
    sites = bs.calibrate(model, ids)
    roles = {"start"} if length == 1 else {"start", "elsewhere"}
    assert {(s.layer, s.channel, s.role) for s in sites} == {
        (layer, A, role) for layer in range(1, models.LAYERS) for role in roles
    }
    assert sites.widespread() == set()


def test_short_documents_of_packed_rows_keep_the_sites_of_their_starts():
    """Half of all tokens are start tokens."""
    ids = models.tokens(3, 24, 1, None)
    ids[:, ::2] = START_ID
    positions = torch.arange(24).remainder(2).expand(3, -1)
    sites = bs.calibrate(stepped(STEPS), {"input_ids": ids, "position_ids": positions})
    assert {(s.role, s.count) for s in sites} == {("start", 36)}


def test_the_decision_is_of_all_data_and_survives_a_file(tmp_path):
    model = uniform_model(of=slice(2, 50))
    few = models.tokens(2, 16, 1, None)
    few[:, 1:] = 60
    few[:, 3] = 7
    most = few.clone()
    most[:, 1:] = 8
    parts = bs.calibrate(model, few), bs.calibrate(model, torch.cat([most, most]))
    assert [(0, UNIFORM) in places(part) for part in parts] == [True, False]
    whole = parts[0] + parts[1]
    assert whole == parts[1] + parts[0]
    assert (0, UNIFORM) not in places(whole)
    whole.save(tmp_path / "sites.safetensors")
    assert bs.Sites.load(tmp_path / "sites.safetensors").widespread() == whole.widespread()
