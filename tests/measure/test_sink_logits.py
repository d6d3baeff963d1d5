"""Logits fitted to k', against shares written out from all logits of the attention."""

from __future__ import annotations

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import BadBatch, BadOption
from biassurgery.measure.sink_logits import fit_sink_logits
from tests import models
from tests.models import LAYERS, PAD_ID


@pytest.mark.parametrize("mode", ["transplant", "kv"])
def test_the_mean_share_of_each_head_is_that_of_its_key(mode):
    model = models.planted("llama")
    ids = models.tokens(3, 14)[:, 1:]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ids[0, :4] = PAD_ID
    if mode == "transplant":
        key_values = bs.calibrate_key_values(model, models.tokens(4, 12))
        bs.patch_model(model, mode, key_values=key_values)
    else:
        torch.manual_seed(0)
        bs.patch_model(model, "attention_bias", kind="kv", std=2.0)
    batches = [{"input_ids": part, "attention_mask": m} for part, m in zip(ids, mask)]
    batches = [{name: x[None] for name, x in batch.items()} for batch in batches]
    fitted = fit_sink_logits(model, batches)
    with bs.record(model, ("q", "logits")) as rec, torch.no_grad():
        model(ids, attention_mask=mask)
    real = mask.bool()
    assert fitted.shape[0] == LAYERS
    for layer in range(LAYERS):
        q, logits = rec["q"][layer], rec["logits"][layer]
        attention = model.model.layers[layer].self_attn
        (edit,) = (e for name, e in attention.named_children() if hasattr(e, "k_bias"))
        key = edit.k_bias.detach().repeat_interleave(q.shape[1] // len(edit.k_bias), 0)
        own = torch.einsum("bhtd,hd->bht", q, key) / q.shape[-1] ** 0.5
        whole = logits.exp().sum(-1)
        wanted = (own.exp() / (own.exp() + whole)).transpose(0, 1)[:, real].mean(1)
        sink = fitted[layer].exp()[None, :, None]
        found = (sink / (sink + whole)).transpose(0, 1)[:, real].mean(1)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    assert fitted.std() > 0.1


def test_what_has_no_key_is_refused():
    model = models.planted("llama")
    ids = models.tokens(2, 12)
    with pytest.raises(BadOption, match="k'"):
        fit_sink_logits(model, ids)
    with (
        bs.patched(model, "attention_bias", kind="sink_logit"),
        pytest.raises(BadOption, match="k'"),
    ):
        fit_sink_logits(model, ids)
    with bs.patched(model, "attention_bias", kind="kv"), pytest.raises(BadBatch):
        fit_sink_logits(model, [])


def test_a_key_that_takes_all_attention():
    """A share that is 1 in float32 says nothing more of the others' logits; the sink has it too."""
    model = models.planted("llama")
    ids = torch.tensor([[7]])
    bs.patch_model(model, "attention_bias", kind="k", init="normal")
    with bs.record(model, ("q", "logits")) as rec, torch.no_grad():
        model(ids)
    q = rec["q"][0][0, :, 0]  # (H, d)
    (edit,) = (e for e in model.model.layers[0].self_attn.children() if hasattr(e, "k_bias"))
    shared = len(edit.k_bias)
    with torch.no_grad():
        edit.k_bias.copy_(1e4 * q.view(shared, -1, q.shape[-1]).mean(1))
    fitted = fit_sink_logits(model, ids)[0]
    own = (q * edit.k_bias.detach().repeat_interleave(len(q) // shared, 0)).sum(-1)
    assert own.min() > 100
    assert (fitted - rec["logits"][0][0, :, 0, 0]).sigmoid().min() > 1 - 1e-6
