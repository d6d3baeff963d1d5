"""The attention of [CLS] and of the roles, as numbers."""

from __future__ import annotations

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import BadBatch, LayerOutOfRange, UnsupportedModel
from tests.models import (
    HEADS,
    LAYERS,
    images,
    planted,
    planted_vit,
    tokens,
)
from tests.plots.drawn import SIDE
from tests.state import untouched
from tests.written_out_attention import Dense, dense

pytest.importorskip("matplotlib", reason="needs matplotlib (the report extra)")


@pytest.mark.parametrize("layer", [-1, 0, 2, -LAYERS])
@pytest.mark.parametrize("registers", [0, 2])
def test_the_attention_of_cls_is_the_first_row(layer, registers):
    model = planted_vit(reg_tokens=registers)
    batch = images(3)
    with untouched(model, batch):
        found = bs.cls_attention(model, batch, layer)
    assert (found.shape, found.dtype) == ((3, HEADS, 1 + registers + SIDE**2), torch.float32)
    torch.testing.assert_close(
        found.double(), dense(model, batch)[layer].probs[:, :, 0], rtol=1e-4, atol=1e-6
    )
    assert torch.equal(
        bs.cls_attention(model, [batch[:2], (batch[2:], torch.zeros(1))], layer)[:2], found[:2]
    )


def test_patches_and_explicit_biases_are_part_of_it():
    model = planted_vit()
    batch = images(2)
    before = bs.cls_attention(model, batch)
    with bs.patched(model, "set_zero", sites=bs.calibrate(model, batch)):
        assert not torch.allclose(bs.cls_attention(model, batch), before, atol=1e-3)
    bs.patch_model(model, "attention_bias", init="normal")
    with bs.record(model, ("bias_mass", "probs"), layers=[1]) as seen, torch.no_grad():
        model(batch)
    found = bs.cls_attention(model, batch, 1)
    torch.testing.assert_close(found, seen["probs"][1][:, :, 0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        found.sum(-1), 1 - seen["bias_mass"][1][:, :, 0], rtol=1e-4, atol=1e-6
    )
    assert (found.sum(-1) < 0.999).all()


def test_attention_by_role_is_a_mean_over_images_and_heads():
    model = planted_vit(reg_tokens=2, dynamic_img_size=True).train()
    batches = [images(3), torch.randn(1, 3, 28, 42)]
    with untouched(model):
        found = bs.attention_by_role(model, batches, 2)
    rows = []
    for batch in batches:
        with Dense() as seen, torch.no_grad():
            model.eval()(batch)
        for row in seen.calls[2].probs[:, :, 0].mean(1):
            rows.append([row[0], row[1], row[2], row[3:].sum()])
    wanted = torch.tensor(rows, dtype=torch.float64).mean(0)
    assert list(found) == ["cls", "register:0", "register:1", "patch"]
    assert list(found.values()) == pytest.approx(wanted.tolist(), rel=1e-5)
    assert sum(found.values()) == pytest.approx(1)


def test_models_and_layers_without_such_an_attention():
    with pytest.raises(UnsupportedModel, match=r"no \[CLS\]"):
        bs.cls_attention(planted_vit(class_token=False, global_pool="avg"), images(1))
    with pytest.raises(UnsupportedModel, match=r"no \[CLS\]"):
        bs.attention_by_role(planted("llama"), tokens())
    for layer in (LAYERS, -LAYERS - 1):
        with pytest.raises(LayerOutOfRange, match=f"layer: {layer}"):
            bs.cls_attention(planted_vit(), images(1), layer)
    model = planted_vit()
    with untouched(model, images(1)), pytest.raises(BadBatch):
        bs.cls_attention(model, [images(1), torch.zeros(2, 3)])
