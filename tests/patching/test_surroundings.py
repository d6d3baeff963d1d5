"""What the caller's default dtype, default device and inference mode must not change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import biassurgery as bs
from tests.models import LAYER, planted, tokens


@pytest.fixture(scope="module")
def sites() -> bs.Sites:
    return bs.calibrate(planted("llama"), [tokens()])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(seed=5)).logits


@pytest.mark.parametrize("mode", ["set_mean", "set_zero", "noise", "zero_random"])
def test_levels_are_float32_whatever_the_default_dtype(sites, mode):
    before = torch.get_default_dtype()
    model = planted("llama")
    try:
        torch.set_default_dtype(torch.bfloat16)
        bs.patch_model(model, mode, sites=sites)
    finally:
        torch.set_default_dtype(before)
    plain = bs.patch_model(planted("llama"), mode, sites=sites)
    got, expected = (dict(m.model.layers[LAYER].named_buffers()) for m in (model, plain))
    assert got.keys() == expected.keys()
    assert all(
        got[name].dtype == expected[name].dtype and torch.equal(got[name], expected[name])
        for name in got
    )


def test_a_default_device_does_not_decide_where_calibration_and_patches_live(sites):
    model = planted("llama")
    batch = tokens()
    with torch.device("meta"):
        assert list(bs.calibrate(model, [batch])) == list(sites)
        assert bs.detect(model, [batch]).sites.layers() == sites.layers()
        for mode in ("set_mean", "zero_random"):
            bs.patch_model(model, mode, sites=sites)
    expected = bs.patch_model(
        bs.patch_model(planted("llama"), "set_mean", sites=sites), "zero_random", sites=sites
    )
    assert torch.equal(logits(model), logits(expected))


def test_a_patch_made_in_inference_mode_can_be_trained_through(sites):
    model = planted("llama")
    with torch.inference_mode():
        bs.patch_model(model, "set_mean", sites=sites)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
