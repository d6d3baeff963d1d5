"""Masks, labels and token ids that are refused, and those that are heeded."""

from __future__ import annotations

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import BadBatch
from tests.models import VOCAB, planted, tokens


def test_a_pair_of_ids_and_mask_is_refused_and_labels_are_heeded():
    model = planted("llama")
    ids = tokens()
    with pytest.raises(BadBatch, match="mask"):
        bs.calibrate(model, [(ids, torch.ones_like(ids))])
    assert len(bs.calibrate(model, [(ids, torch.zeros(len(ids)))]))  # one label a sequence
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < 12, -100)
    assert bs.perplexity(model, [(ids, labels)]) == bs.perplexity(
        model, [{"input_ids": ids, "labels": labels}]
    )
    assert bs.perplexity(model, [(ids, labels)]) != bs.perplexity(model, [ids])


@pytest.mark.parametrize(
    "mask", [torch.ones(4, 1, 24, 24), {"full_attention": None}, torch.ones(24)]
)
def test_other_masks_are_refused(mask):
    with pytest.raises(BadBatch, match="attention_mask"):
        bs.calibrate(planted("llama"), [{"input_ids": tokens(), "attention_mask": mask}])


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_tokens_that_the_model_does_not_have_are_refused(token):
    with pytest.raises(BadBatch, match=f"token {token}"):
        bs.detect(planted("gpt2"), [tokens().index_fill(1, torch.tensor(3), token)])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int16])
def test_token_ids_that_no_embedding_takes_are_refused(dtype):
    with pytest.raises(BadBatch, match="int64"):
        bs.calibrate(planted("llama"), [tokens().to(dtype)])
