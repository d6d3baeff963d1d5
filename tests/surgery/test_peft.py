"""A model under a LoRA adapter of peft is patched, measured and trained as the model itself is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import biassurgery as bs
from tests import vision
from tests.models import images, planted, tokens
from tests.state import output_of


def adapted():
    torch.manual_seed(0)
    return get_peft_model(planted("llama"), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))


def test_lora():
    ids = tokens()
    model = adapted()
    sites = bs.calibrate(planted("llama"), [ids])
    keys = list(model.state_dict())
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


ON_ATTENTION = ("instrument", "attention_bias", "transplant")


def on_attention(name: str, model: Any) -> Any:
    torch.manual_seed(3)
    options = {
        "attention_bias": {"kind": "kv", "std": 1.0},
        "transplant": {"key_values": bs.calibrate_key_values(started(), tokens())},
    }
    return bs.patch_model(model, name, **options.get(name, {}))


def started() -> Any:
    """A model whose adapter is not nil, as after training."""
    model = adapted()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    return model


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", ON_ATTENTION)
def test_attention_under_lora(name: str) -> None:
    """Patched under the adapter, or adapted when patched: the same numbers; merging the adapter
    keeps them, unpatching is bitwise.
    """
    ids = tokens()[:, 1:] if name == "transplant" else tokens()
    plain = logits(started(), ids)
    model = on_attention(name, started())
    found = logits(model, ids)
    if name == "transplant":
        assert (found - logits(started(), tokens())[:, 1:]).abs().max() < 1e-4
    else:
        assert ((found - plain).abs().max() > 0.05) == (name == "attention_bias")
    inner = on_attention(name, planted("llama"))
    torch.manual_seed(0)
    outer = get_peft_model(inner, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    outer.load_state_dict(model.state_dict())
    assert torch.equal(logits(outer, ids), found)
    torch.testing.assert_close(
        logits(on_attention(name, started()).merge_and_unload(), ids), found, rtol=1e-4, atol=1e-4
    )
    bs.unpatch_model(model)
    assert torch.equal(logits(model, ids), plain)
    bs.unpatch_model(outer)
    assert torch.equal(logits(outer, ids), plain)


def test_bias_and_adapter_are_trained_together() -> None:
    model = on_attention("attention_bias", started())
    ids = tokens()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained if "lora" not in name} == {
        "k_bias",
        "v_bias",
    }
    assert any("lora" in name for name in trained)
    assert all(grad is not None and grad.abs().max() > 0 for grad in trained.values())
    bs.unpatch_model(model)
    assert all("lora" in name for name, p in model.named_parameters() if p.requires_grad)


def test_training_the_bias_only_leaves_the_adapter_alone() -> None:
    model = started()
    ids = tokens()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    bs.patch_model(model, "attention_bias", trainable="bias")
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert {
        name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None
    } == {"k_bias", "v_bias"}
    bs.unpatch_model(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable


def test_unpatching_beside_lora_thaws_nothing():
    import peft

    model = bs.patch_model(planted("llama"), "attention_bias", trainable="bias")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    trainable = {
        name for name, p in adapted.named_parameters() if p.requires_grad and "bias" not in name
    }
    bs.unpatch_model(adapted)
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == trainable != set()


def test_instrument_is_the_identity_beside_a_lora_that_torch_does_not_see() -> None:
    """nn.MultiheadAttention reads the weight of its output projection and does not call it."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["out_proj"], init_lora_weights=False, r=2)
    model: Any = peft.get_peft_model(vision.planted("open_clip_vision"), config).eval()
    plain = output_of(model, images(2))
    bs.patch_model(model, "instrument")
    torch.testing.assert_close(output_of(model, images(2)), plain, rtol=1e-4, atol=1e-4)
