"""Attention sinks in `detect`: which models have them, which cannot be read, what is reported."""

from __future__ import annotations

import pytest
import torch

import biassurgery as bs
from biassurgery.cli.demo import load_demo_model
from biassurgery.data.packaged import packaged_text, text_batches
from biassurgery.errors import UnsupportedModel
from biassurgery.measure.sequences import positions_of
from tests.models import (
    FAMILIES,
    HEADS,
    LAYER,
    images,
    planted,
    planted_vit,
    tokens,
)
from tests.state import untouched


def test_a_planted_model_has_massive_activations_without_sinks_and_the_other_way_round():
    """Zeroed queries spread attention evenly; a key that all queries like makes a sink where
    nothing is massive.
    """
    model = planted("llama")
    ids = tokens(rows=4, length=64, delimiter_at=None)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.q_proj.weight.zero_()
    sinks = bs.detect(model, [ids]).sinks
    even = sum(1 / (t + 1) for t in range(1, 64)) / 63
    for layer in sinks.layers:
        assert layer.attention == pytest.approx([even] * HEADS, rel=1e-4)
        assert sum(layer.sink) == 0
    assert sinks.metric == 0
    late = sinks.layers[LAYER + 1]
    assert (late.massive_tokens, late.massive_sinks, late.start_massive) == (4, 0.0, 1.0)
    bs.patch_model(model, "set_zero", sites=bs.calibrate(model, [ids]))
    with torch.no_grad():
        patched = bs.detect(model, [ids])
    assert (
        patched.sinks.layers[LAYER + 1].massive_tokens == 0
    )  # patches are part of what is measured
    assert patched.sinks.layers[LAYER + 1].attention == pytest.approx([even] * HEADS, rel=1e-4)

    import transformers

    torch.manual_seed(0)
    sink = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=HEADS, n_positions=64)
    ).eval()
    with torch.no_grad():
        sink.transformer.wpe.weight[0] = 0
        sink.transformer.wpe.weight[0, 5] = (
            9.0  # after the norm, the key of position 0 is large in all that reads channel 5
        )
        for block in sink.transformer.h:
            block.attn.c_attn.weight[5, 64:128] = 3.0
            block.attn.c_attn.bias[:64] = 1.0
    found = bs.detect(sink, [ids])
    assert found.sinks.metric == 1
    assert len(found.sites) == 0
    assert [layer.massive_tokens for layer in found.sinks.layers] == [0, 0]


def test_the_demo_checkpoint_has_both():
    model, tokenizer = load_demo_model()
    batches = text_batches(
        tokenizer, packaged_text("calibration"), model.config.max_position_embeddings
    )[:2]
    sinks = bs.detect(model, batches, min_ratio=100.0).sinks
    with torch.no_grad():
        model.set_attn_implementation("eager")
        weights = [
            torch.cat(layer).double()
            for layer in zip(*(model(ids, output_attentions=True).attentions for ids in batches))
        ]
    for layer, attention in zip(sinks.layers, weights):
        assert layer.attention == pytest.approx(
            attention[:, :, 1:, 0].mean((0, 2)).tolist(), rel=1e-4
        )
        assert layer.sink == pytest.approx(
            (attention[..., 0].mean(2) > 0.3).double().mean(0).tolist()
        )
        if layer.layer:
            assert layer.on_massive == pytest.approx(layer.attention)
            assert layer.start_massive == pytest.approx(1)
    assert sinks.metric > 0.5
    assert sinks.layers[3].massive_sinks > 0.99


@pytest.mark.parametrize("family", [*FAMILIES, "timm"])
def test_the_model_is_left_as_it_was(family):
    model, batch = (
        (planted_vit(), images(2)) if family == "timm" else (planted(family), tokens(rows=2))
    )
    with untouched(model, batch):
        assert (
            bs.detect(model, iter([batch])).sinks is not None
        )  # a source that can be read once only
    broken = (
        batch * float("nan")
        if family == "timm"
        else {"input_ids": batch, "attention_mask": torch.zeros_like(batch)}
    )
    with untouched(model, batch), pytest.raises(bs.SurgeryError):
        bs.detect(model, [batch, broken])


def test_models_without_a_route_are_detected_without_sinks():
    import transformers

    torch.manual_seed(0)
    model = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=2)
    ).eval()
    ids = tokens(2, 12)
    with untouched(model, ids):
        found = bs.detect(model, [ids])
    assert found.sinks is None
    assert "BloomForCausalLM" in found.no_sinks
    assert "Attention sinks were not measured. model: " in str(found)
    assert len(found.layers) == 2


def test_attention_that_turns_out_to_be_unreadable_is_told(monkeypatch):
    """A model whose forward only then shows that the core cannot serve it is still detected."""
    from biassurgery.surgery import routes

    model = planted("llama")
    ids = tokens()
    plain = bs.detect(model, [ids])

    def refuse(*_, **__):
        raise UnsupportedModel("model: its attention is strange.")

    monkeypatch.setattr(routes, "_interface_call", refuse)
    with untouched(model, ids):
        found = bs.detect(model, [ids])
    assert (found.sinks, found.no_sinks) == (None, "model: its attention is strange.")
    assert (found.sites, found.layers, found.positions) == (
        plain.sites,
        plain.layers,
        plain.positions,
    )


def test_a_table_and_a_frame():
    found = bs.detect(planted("llama"), [tokens()])
    text = str(found)
    frame = found.sinks.to_pandas()
    assert "Attention on the start token" in text
    assert f"sink metric {100 * found.sinks.metric:.1f} %" in text
    assert list(frame.columns) == [
        "attention",
        "attention_max",
        "sink",
        "on_massive",
        "massive_tokens",
        "massive_sinks",
        "start_massive",
    ]
    for layer in found.sinks.layers:
        assert frame.loc[layer.layer, "attention"] == pytest.approx(sum(layer.attention) / HEADS)
        assert frame.loc[layer.layer, "attention_max"] == max(layer.attention)
        assert frame.loc[layer.layer, "massive_tokens"] == layer.massive_tokens


def test_positions_of():
    at, present = positions_of(torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]).bool())
    assert at.tolist() == [[1, 3], [0, 0], [2, 0]]
    assert present.tolist() == [[True, True], [False, False], [True, False]]


def test_measuring_takes_a_patch_that_needs_two_sequences():
    """The trial run for sinks is as many rows as `shuffle` needs."""
    model = planted("llama")
    sites = bs.calibrate(model, tokens())
    with bs.patched(model, "shuffle", sites=sites):
        assert bs.detect(model, tokens()).sinks is not None


@pytest.mark.parametrize("images_", [False, True])
def test_sinks_of_a_float64_model(images_):
    """Massive tokens are counted in its dtype, too."""
    model, batch = (planted_vit(), images(3)) if images_ else (planted("llama"), tokens(rows=3))
    single = bs.detect(model, batch).sinks
    double = bs.detect(model.double(), batch.double() if images_ else batch).sinks
    assert sum(layer.massive_tokens for layer in single.layers) > 0
    for one, other in zip(single.layers, double.layers):
        assert other.massive_tokens == one.massive_tokens
        assert other.on_massive == pytest.approx(one.on_massive, rel=1e-3)
        assert other.start_massive == pytest.approx(one.start_massive, rel=1e-3)
