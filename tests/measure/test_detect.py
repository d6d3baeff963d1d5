"""`detect` against loops over hidden states, in float64."""

from __future__ import annotations

import copy

import pytest
import torch

import biassurgery as bs
from tests.models import (
    CHANNEL,
    DELIMITER,
    LAYER,
    LAYERS,
    PATCHES,
    blocks,
    images,
    planted,
    planted_vit,
    tokens,
)


def hidden_states(model, family, inputs):
    """Every block's output as (B, T, D) float64, caught by hooks."""
    caught = []
    handles = [
        block.register_forward_hook(
            lambda m, a, out: caught.append((out if torch.is_tensor(out) else out[0]).double())
        )
        for block in blocks(model, family)
    ]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return caught


@pytest.mark.parametrize("family", ["llama", "gpt2", "mpt"])
def test_layers_hold_the_mean_top_three_and_the_exact_median(family):
    model = planted(family)
    batches = [tokens(rows=3, seed=1), tokens(rows=2, length=17, seed=2)]
    found = bs.detect(model, batches)
    rows = [
        [
            sequence
            for batch in batches
            for sequence in hidden_states(model, family, batch)[layer].abs()
        ]
        for layer in range(LAYERS)
    ]
    assert (found.sequences, found.tokens) == (5, 3 * 24 + 2 * 17)
    rounding = (
        2e-5 if family == "mpt" else 1e-6
    )  # MPT computes its softmax itself, where `detect` reads it through a fused kernel
    for summary, sequences in zip(found.layers, rows):
        tops = torch.stack([s.flatten().sort(descending=True).values[:3] for s in sequences]).mean(
            0
        )
        medians = torch.stack(
            [s.flatten().sort().values[(s.numel() - 1) // 2] for s in sequences]
        ).mean()
        torch.testing.assert_close(
            torch.tensor(summary.top, dtype=torch.float64), tops, rtol=rounding, atol=0
        )
        assert summary.median == pytest.approx(medians.item(), rel=rounding)
        assert summary.ratio == pytest.approx((tops[0] / medians).item(), rel=rounding)


def test_sites_roles_and_positions_are_those_of_the_plant():
    model = planted("llama")
    batch = tokens(rows=4, delimiter_at=9)
    found = bs.detect(model, [batch])
    assert found.sites == bs.calibrate(model, [batch])
    assert {(r.layer, r.role): (r.count, r.share) for r in found.roles if r.layer == LAYER} == {
        (LAYER, "start"): (4, 0.5),
        (LAYER, "elsewhere"): (4, 0.5),
    }
    assert [(p.position, p.count) for p in found.positions if p.layer == LAYER] == [(0, 4), (9, 4)]
    assert not [p for p in found.positions if p.layer < LAYER]


def test_positions_of_images_are_the_planted_patches():
    model = planted_vit()
    found = bs.detect(model, [images(6)])
    sites = {(s.channel, s.role) for s in found.sites}
    assert sites == {(CHANNEL, "patch")}
    assert {p.position for p in found.positions if p.layer == LAYER} == {
        patch + 1 for patch in PATCHES
    }  # after [CLS]


def test_outlier_features_follow_dettmers():
    """A channel of magnitude above 6 at every token and layer counts; one at 5 % of the tokens does
    not.
    """
    model = planted("llama")
    often = 40
    rarely = 41
    with torch.no_grad():
        for block in blocks(model, "llama"):
            for channel in (often, rarely):
                block.self_attn.o_proj.weight[channel] = 0
                block.mlp.down_proj.weight[channel] = 0
        model.get_input_embeddings().weight[:, often] = 8.0
        model.get_input_embeddings().weight[:, rarely] = 0.0
        model.get_input_embeddings().weight[0, rarely] = 8.0  # the start token only: 1 of 24
    assert bs.detect(model, [tokens(rows=5, delimiter_at=None)]).outlier_features == (often,)


def test_padding_is_left_out_of_everything():
    model = planted("llama")
    ids = tokens(rows=2)
    padded = torch.cat([torch.full((2, 5), 95), ids], 1)
    mask = (torch.arange(29) >= 5).long().expand(2, 29)
    plain = bs.detect(model, [ids])
    left = bs.detect(model, [{"input_ids": padded, "attention_mask": mask}])
    for a, b in zip(plain.layers, left.layers):
        assert b.top == pytest.approx(a.top, rel=1e-5)
        assert b.median == pytest.approx(a.median, rel=1e-5)
    assert (left.tokens, left.sequences) == (plain.tokens, plain.sequences)
    assert [p.position - 5 for p in left.positions] == [p.position for p in plain.positions]


def test_it_prints_and_becomes_a_frame():
    model = planted("llama")
    before = copy.deepcopy(model.state_dict())
    found = bs.detect(model, [tokens()])
    text = str(found)
    frame = found.to_pandas()
    assert "elsewhere" in text
    assert "0 (4), 9 (4)" in text
    assert frame.loc[LAYER, "massive"] == 8
    assert frame.loc[LAYER, "top_1"] == pytest.approx(DELIMITER, rel=0.1)
    assert list(frame.columns) == ["top_1", "top_2", "top_3", "median", "ratio", "massive"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
