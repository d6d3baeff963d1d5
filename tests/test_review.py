"""Regressions: what the caller's surroundings, numpy, or the order of patches must not change."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import biassurgery as bs
from tests.models import CHANNEL, LAYER, VOCAB, planted, tokens

LATER = LAYER + 1


@pytest.fixture(scope="module")
def sites() -> bs.Sites:
    return bs.calibrate(planted("llama"), [tokens()])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(seed=5)).logits


@pytest.mark.parametrize("positions_first", [True, False])
def test_overlapping_patches_load_in_the_order_in_which_they_were_applied(
    sites, tmp_path, positions_first
):
    steps = [
        (
            "set_value",
            dict(layers=[LATER], channels=[CHANNEL], positions=[4], value=2 * sites[0].mean),
        ),
        ("set_zero", dict(sites=sites, layers=[LAYER, LATER])),
    ]
    model = planted("llama")
    other = planted("llama")
    for (mode, options), (other_mode, other_options) in zip(
        steps[:: 1 if positions_first else -1], steps[:: -1 if positions_first else 1]
    ):
        bs.patch_model(model, mode, **options)
        bs.patch_model(other, other_mode, **other_options)
    assert not torch.equal(logits(model), logits(other))  # the order matters
    bs.save_patch(model, tmp_path)
    again = bs.load_patch(planted("llama"), tmp_path)
    assert [patch.mode.name for patch in bs.patches(again)] == [
        mode for mode, _ in steps[:: 1 if positions_first else -1]
    ]
    assert torch.equal(logits(again), logits(model))


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


def test_blocks_compiled_without_graph_breaks_can_be_calibrated(sites):
    model = planted("llama")
    for block in model.model.layers:
        block.compile(backend="eager", fullgraph=True)
    assert list(bs.calibrate(model, [tokens()])) == list(sites)


def test_numbers_and_indices_of_numpy(sites, tmp_path):
    model = bs.patch_model(
        planted("llama"),
        "set_value",
        sites=sites,
        value=np.float32(50),
        layers=np.array([LAYER, LATER]),
    )
    bs.save_patch(model, tmp_path)
    (saved,) = json.loads((tmp_path / "surgery.json").read_text())["patches"]
    assert saved["options"]["value"] == 50
    assert saved["layers"] == [LAYER, LATER]
    assert type(bs.Noise(scale=np.float32(2)).scale) is float


def test_a_pair_of_ids_and_mask_is_refused_and_labels_are_heeded():
    model = planted("llama")
    ids = tokens()
    with pytest.raises(bs.BadBatch, match="mask"):
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
    with pytest.raises(bs.BadBatch, match="attention_mask"):
        bs.calibrate(planted("llama"), [{"input_ids": tokens(), "attention_mask": mask}])


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_tokens_that_the_model_does_not_have_are_refused(token):
    with pytest.raises(bs.BadBatch, match=f"token {token}"):
        bs.detect(planted("gpt2"), [tokens().index_fill(1, torch.tensor(3), token)])


def test_sites_take_numbers_of_numpy_and_refuse_words(tmp_path):
    site = bs.Site(
        np.int64(1),
        np.int64(7),
        "start",
        np.float32(3.5),
        std=np.float64(0.5),
        count=torch.tensor(4),
    )
    assert (type(site.layer), type(site.mean), site.count) == (int, float, 4)
    bs.Sites([site]).save(tmp_path / "sites.safetensors")
    assert list(bs.Sites.load(tmp_path / "sites.safetensors")) == [site]
    for wrong in (dict(layer="1"), dict(layer=1.5), dict(mean="x"), dict(mean=None)):
        with pytest.raises(bs.BadOption, match=next(iter(wrong))):
            bs.Site(**{**dict(layer=1, channel=7, role="start", mean=3.0), **wrong})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int16])
def test_token_ids_that_no_embedding_takes_are_refused(dtype):
    with pytest.raises(bs.BadBatch, match="int64"):
        bs.calibrate(planted("llama"), [tokens().to(dtype)])


def test_a_window_may_be_longer_than_a_vocabulary_of_the_size_of_the_context():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        max_position_embeddings=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    stream = tokens(1, 2 * VOCAB).flatten()
    assert bs.perplexity(LlamaForCausalLM(config).eval(), stream, length=2 * VOCAB) > 1


def test_the_distillation_token_of_deit_is_no_patch():
    import timm

    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=2).eval()
    with torch.no_grad():
        model.dist_token[..., CHANNEL] = 1e6
    found = bs.calibrate(
        model, [torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))]
    )
    assert {site.role for site in found.at(0)} == {"distillation"}
    assert {site.count for site in found.at(0)} == {2}
