"""`ordinary_tokens` against attention matrices and hidden states of transformers' own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import biassurgery as bs
from biassurgery.errors import BadOption
from tests.models import (
    CHANNEL,
    DELIMITER_ID,
    LAYER,
    PATCHES,
    START_ID,
    images,
    planted,
    planted_vit,
    tokens,
)


def received(model, ids):
    """(B, T): of each token the most, over layers, that later tokens pay it, mean over heads."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    length = ids.shape[1]
    means = [
        torch.stack([probs.mean(1)[:, k + 1 :, k].mean(1) for k in range(length - 8)], 1)
        for probs in attentions
    ]
    return F.pad(torch.stack(means).amax(0), (0, 8))  # fewer than 8 see the last ones


@pytest.mark.parametrize("min_share", [0.06, 0.1, 0.3])
def test_they_are_neither_massive_nor_sinks(min_share):
    model, ids = planted("llama"), tokens(rows=3, length=32)
    massive = (ids == START_ID) | (ids == DELIMITER_ID)
    shares = received(model, ids)
    sinks = shares > min_share
    assert (sinks & ~massive).any() or min_share > 0.06
    found = bs.ordinary_tokens(model, ids, min_share=min_share)
    assert found.dtype == torch.bool
    assert torch.equal(found, ~massive & ~sinks)
    assert bs.patches(model) == ()


def test_a_sink_alone_is_left_out_and_can_be_kept():
    """Without its massive activations the model has sinks all the same where heads are told so."""
    model, ids = planted("llama"), tokens(rows=2, length=32, delimiter_at=None)
    with torch.no_grad():
        model.model.layers[LAYER].mlp.down_proj.weight[CHANNEL] = 0
    shares = received(model, ids)
    level = shares.flatten().sort().values[-3:].mean().item()
    found = bs.ordinary_tokens(model, ids, min_share=level)
    assert 0 < (~found).sum() < 3
    assert torch.equal(found, shares <= level)
    assert bs.ordinary_tokens(model, ids, min_share=None).all()


def test_padding_is_not_ordinary():
    model, ids = planted("llama"), tokens(rows=2, length=32)
    padded = F.pad(ids, (3, 0), value=5)
    mask = F.pad(torch.ones_like(ids), (3, 0))
    batch = {"input_ids": padded, "attention_mask": mask}
    batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    found = bs.ordinary_tokens(model, batch)
    assert not found[:, :3].any()
    assert torch.equal(found[:, 3:], bs.ordinary_tokens(model, ids))


def test_images_have_their_prefix_tokens():
    found = bs.ordinary_tokens(planted_vit(), images(2), min_share=None)
    massive = [1 + patch for patch in PATCHES]
    assert found.shape == (2, 17)
    assert (~found).nonzero()[:, 1].tolist() == massive * 2


@pytest.mark.parametrize("share", [0, 1, 1.5, True, "all", float("nan")])
def test_shares_that_are_none(share):
    with pytest.raises(BadOption, match="min_share"):
        bs.ordinary_tokens(planted("llama"), tokens(), min_share=share)
