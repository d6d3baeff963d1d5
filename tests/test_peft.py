"""A model under a LoRA adapter of peft is patched, measured and trained as the model itself is."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model

import biassurgery as bs
from tests.models import planted, tokens


def adapted():
    torch.manual_seed(0)
    return get_peft_model(planted("llama"), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))


def test_lora():
    ids, model = tokens(), adapted()
    sites, keys = bs.calibrate(planted("llama"), [ids]), list(model.state_dict())
    assert bs.calibrate(model, [ids]) == sites
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        with bs.patched(model, "set_zero", sites=sites):
            assert (model(input_ids=ids, use_cache=False).logits - before).abs().max() > 0.05
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    assert bs.patch_model(model, "set_mean", sites=sites) is model
    assert list(model.state_dict()) == keys
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(grad is not None for grad in trained.values())
