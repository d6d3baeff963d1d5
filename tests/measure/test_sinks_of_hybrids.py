"""Attention sinks where not every layer has an attention, or not one of its own."""

from __future__ import annotations

import pytest
import torch
import transformers

import biassurgery as bs
from biassurgery.errors import UnsupportedModel
from tests.models import planted, tokens
from tests.state import untouched

KINDS = ["conv", "full_attention", "conv", "full_attention"]


def hybrid() -> torch.nn.Module:
    """LFM 2: short convolutions, and an attention in every second layer."""
    torch.manual_seed(0)
    config = transformers.Lfm2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=KINDS,
        block_auto_adjust_ff_dim=False,
    )
    return transformers.Lfm2ForCausalLM(config).eval()


def test_layers_that_attend_are_reported_and_the_others_said():
    model = hybrid()
    ids = tokens(rows=3, length=12)
    with untouched(model, ids):
        found = bs.detect(model, [ids])
    assert found.no_sinks == ""
    assert [layer.layer for layer in found.sinks.layers] == [1, 3]
    assert found.sinks.without_attention == (0, 2)
    assert "layers without attention: 0, 2" in str(found)
    assert (found.sinks.sequences, found.sinks.queries) == (3, 3 * 11)
    with bs.record(model, "probs") as rec, torch.no_grad():
        model(ids)
    eager = hybrid()
    eager.set_attn_implementation("eager")
    weights = []
    for layer in (1, 3):
        attention = eager.model.layers[layer].self_attn
        attention.register_forward_hook(lambda m, args, output: weights.append(output[1].double()))
    with torch.no_grad():
        eager(ids)
    for layer, attention in zip(found.sinks.layers, weights, strict=True):
        torch.testing.assert_close(rec["probs"][layer.layer], attention.float())
        assert layer.attention == pytest.approx(
            attention[:, :, 1:, 0].mean((0, 2)).tolist(), rel=1e-4
        )
        alpha = attention[..., 0].mean(2)
        assert layer.sink == pytest.approx((alpha > 0.3).double().mean(0).tolist())
    every = torch.cat([attention[..., 0].mean(2) > 0.3 for attention in weights]).double()
    assert found.sinks.metric == pytest.approx(every.mean().item())


def test_massive_tokens_reach_the_next_layer_that_attends():
    model = hybrid()
    plain = bs.detect(model, [tokens(rows=2, length=12)])
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] = 0.0
        model.model.embed_tokens.weight[1, 5] = 5e4
    ids = tokens(rows=2, length=12).clamp(min=2)
    ids[:, 0] = 1
    found = bs.detect(model, [ids])
    assert [layer.massive_tokens for layer in plain.sinks.layers] == [0, 0]
    assert [layer.massive_tokens for layer in found.sinks.layers] == [2, 2]
    assert all(layer.start_massive == pytest.approx(1) for layer in found.sinks.layers)
    for layer in found.sinks.layers:
        assert layer.on_massive == pytest.approx(layer.attention)


def test_a_shared_attention_is_a_reason_and_no_crash():
    model = planted("llama")
    model.model.layers[2].self_attn = model.model.layers[1].self_attn
    ids = tokens(rows=2)
    with untouched(model, ids):
        found = bs.detect(model, [ids])
    assert found.sinks is None
    assert "blocks 1 and 2" in found.no_sinks
    assert "share one attention" in found.no_sinks
    assert len(found.sites) > 0
    with untouched(model, ids), pytest.raises(UnsupportedModel, match="share one attention"):
        bs.detect(model, [ids], statistics="sinks")
