"""One report, one definition: roles, positions and sinks count the values that the sites count.

A planted model has massive values of two sizes in one channel, of which only the larger meet the
definition; the gap below the smaller ones makes both massive.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import biassurgery as bs
from tests.measure.image_states import hidden_states, median_of
from tests.measure.plain_calibration import hidden_states as hidden_states_of
from tests.models import (
    CHANNEL,
    DELIMITER_ID,
    KEYS,
    LAYER,
    LAYERS,
    PATCH,
    PATCHES,
    START_ID,
    images,
    planted,
    planted_vit,
    tokens,
)
from tests.written_out_attention import dense

WEAK = 5  # the patch whose value is large, but under the definition
SHARE = 0.1


def two_sizes():
    """A vision transformer with a patch whose value is a tenth of the massive ones."""
    model = planted_vit()
    with torch.no_grad():
        prefix = model.pos_embed.shape[1] - (model.patch_embed.img_size[0] // PATCH) ** 2
        model.pos_embed[0, prefix + WEAK] = model.pos_embed[0, prefix + PATCHES[0]]
        # the norm before the MLP makes the key's share of the token smaller by and by
        model.pos_embed[0, prefix + WEAK, KEYS[START_ID]] = 1.0
    return model, [1 + patch for patch in (*PATCHES, WEAK)]


def beyond(model, batches, gates):
    """(layer, image, position) of all values beyond a layer's gate, and of those that meet the
    definition: written out over hidden states in float64.
    """
    massive, by_definition = set(), set()
    first = 0
    for batch in batches:
        for layer, states in enumerate(hidden_states(model, batch)):
            for image, state in enumerate(states):
                values = state[:, CHANNEL].abs()
                for kept, least in (
                    (massive, gates.get(layer, float("inf"))),
                    (by_definition, max(100, 1000 * median_of(state))),
                ):
                    at = (values > least).nonzero()[:, 0].tolist()
                    kept |= {(layer, first + image, position) for position in at}
        first += len(batch)
    return massive, by_definition


@pytest.mark.parametrize("rows", [1, 3])
def test_values_beyond_the_gate_count_in_every_table(rows):
    model, _ = two_sizes()
    batches = list(images(6).split(rows))
    found = bs.detect(model, batches)
    gates = {site.layer: site.gate for site in found.sites}
    massive, by_definition = beyond(model, batches, gates)
    assert by_definition < massive  # strictly: the gate has something to decide
    weak = {place for place in massive if place[2] == 1 + WEAK}
    assert weak
    assert weak.isdisjoint(by_definition)
    roles = {role.layer: role.count for role in found.roles}
    assert roles == Counter(layer for layer, _, _ in massive)
    positions = {(p.layer, p.position): p.count for p in found.positions}
    assert positions == Counter((layer, position) for layer, _, position in massive)
    assert found.not_placed == 0
    tokens_of = Counter(layer for layer, _, _ in massive)
    assert [layer.massive_tokens for layer in found.sinks.layers] == [
        tokens_of[layer - 1] for layer in range(LAYERS)
    ]


def test_the_attention_on_them_against_dense_matrices():
    model, _ = two_sizes()
    batches = list(images(5).split(2))
    found = bs.detect(model, batches)
    gates = {site.layer: site.gate for site in found.sites}
    massive, _ = beyond(model, batches, gates)
    seen = [dense(model, pixels) for pixels in batches]
    for layer in found.sinks.layers[LAYER + 1 :]:
        weights = torch.cat([calls[layer.layer].probs for calls in seen])  # (5, H, T, T)
        marked = torch.zeros(weights.shape[0], weights.shape[-1], dtype=torch.bool)
        for at, image, position in massive:
            if at == layer.layer - 1:
                marked[image, position] = True
        on_massive = (weights[:, :, 1:] * marked[:, None, None]).sum(-1).mean((0, 2))
        assert layer.on_massive == pytest.approx(on_massive.tolist(), rel=1e-4)
        is_sink = (weights.mean(2) > 0.3).double().transpose(1, 2)[marked]
        assert layer.massive_sinks == pytest.approx(is_sink.mean().item())


def test_values_in_front_of_their_channels_first_hit_are_told_to_be_missing():
    """A batch of small values alone is read before any channel has met the definition."""
    model = planted("llama")
    weak = 7
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[weak] = embedding[START_ID] + 20.0  # a smaller share of it is the key
    strong = tokens(rows=2, length=12)
    small = strong.clone()
    small[:, 0] = weak
    small[small == DELIMITER_ID] = weak + 1
    late = bs.detect(model, [small, strong], min_magnitude=2000)
    early = bs.detect(model, [strong, small], min_magnitude=2000)
    gates = {site.layer: site.gate for site in early.sites}
    assert late.sites == early.sites
    assert early.not_placed == 0
    assert sum(p.count for p in early.positions) == sum(role.count for role in early.roles)
    states = hidden_states_of(model, "llama", {"input_ids": small})
    wanted = sum(
        int((states[layer][..., CHANNEL].abs() > gate).sum()) for layer, gate in gates.items()
    )
    assert late.not_placed == wanted
    assert wanted > 0
    assert "before their channel was known" in str(late)
    assert "before their channel was known" not in str(early)


def test_a_token_with_two_massive_channels_is_one_token():
    model = planted("llama")
    ids = tokens(rows=2, length=12)
    plain = bs.detect(model, [ids])
    with torch.no_grad():
        block = model.model.layers[LAYER]
        other = CHANNEL + 1
        block.mlp.down_proj.weight[other] = block.mlp.down_proj.weight[CHANNEL]
    found = bs.detect(model, [ids])
    assert {site.channel for site in found.sites.at(LAYER)} == {CHANNEL, other}
    assert (
        found.sinks.layers[LAYER + 1].massive_tokens == plain.sinks.layers[LAYER + 1].massive_tokens
    )
    at_layer = [p for p in found.positions if p.layer == LAYER]
    assert sum(p.count for p in at_layer) == 2 * found.sinks.layers[LAYER + 1].massive_tokens
    assert sum(p.tokens for p in at_layer) == found.sinks.layers[LAYER + 1].massive_tokens
    assert DELIMITER_ID in ids


def test_values_and_tokens_are_told_apart_in_images():
    """The MLP that makes the values writes half of each into another channel, too."""
    model, _ = two_sizes()
    other = CHANNEL + 1
    with torch.no_grad():
        linear = model.blocks[LAYER].mlp.fc2
        linear.weight[other] = linear.weight[CHANNEL] / 2
    batches = list(images(5).split(2))
    found = bs.detect(model, batches)
    massive: set[tuple[int, int, int, int]] = set()  # layer, image, position, channel
    first = 0
    gates = {(site.layer, site.channel): site.gate for site in found.sites}
    for batch in batches:
        for layer, states in enumerate(hidden_states(model, batch)):
            for channel in (CHANNEL, other):
                gate = gates.get((layer, channel), float("inf"))
                at = (states[..., channel].abs() > gate).nonzero().tolist()
                massive |= {(layer, first + image, position, channel) for image, position in at}
        first += len(batch)
    held = {place[:3] for place in massive}
    values = Counter((layer, position) for layer, _, position, _ in massive)
    tokens_at = Counter((layer, position) for layer, _, position in held)
    assert {(p.layer, p.position): p.count for p in found.positions} == values
    assert {(p.layer, p.position): p.tokens for p in found.positions} == tokens_at
    by_role: dict[int, tuple[int, int]] = {}
    for role in found.roles:
        count, on = by_role.get(role.layer, (0, 0))
        by_role[role.layer] = count + role.count, on + role.tokens
    assert by_role == {
        layer: (
            sum(place[0] == layer for place in massive),
            sum(place[0] == layer for place in held),
        )
        for layer in by_role
    }
    assert set(by_role) == set(range(LAYER, LAYERS))
    for layer, (count, on) in by_role.items():
        assert count > on
        if layer + 1 < LAYERS:
            assert found.sinks.layers[layer + 1].massive_tokens == on
    printed = " ".join(str(found).split())
    assert "layers role values tokens share of values" in printed
    assert "(values)" in printed
    assert "massive tokens" in printed
