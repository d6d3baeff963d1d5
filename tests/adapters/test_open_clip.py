"""What open_clip's models do in their own way."""

from __future__ import annotations

import torch
from torch import Tensor

import biassurgery as bs
from tests.adapters.towers import HEADS, LAYERS, LENGTH, SIZE, VOCAB, WIDTH, images


def test_batch_first_both_ways() -> None:
    """A tower that keeps (T, B, D) inside computes and is patched as one that keeps (B, T, D)."""
    from open_clip.transformer import VisionTransformer

    found = []
    for batch_first in (True, False):
        torch.manual_seed(0)
        model = VisionTransformer(
            image_size=SIZE,
            patch_size=7,
            width=WIDTH,
            layers=LAYERS,
            heads=HEADS,
            mlp_ratio=2,
            output_dim=5,
        )
        model.transformer.batch_first = batch_first
        for block in model.transformer.resblocks:
            block.attn.batch_first = batch_first
        bs.patch_model(model.eval(), "attention_bias", kind="gate", std=1.0)
        bs.patch_model(model, "attention_bias", kind="kv", std=1.0)
        bs.patch_model(model, "set_value", value=30.0, channels=3, positions=(0, 2), layers=1)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "attention_bias" in name:
                    p.normal_(generator=generator)
        with (
            bs.record(
                model,
                what=("block_input", "block_output", "norm_output", "attention_output", "probs"),
            ) as rec,
            torch.no_grad(),
        ):
            found.append((model(images(3)), {name: rec[name][1] for name in rec}))
    torch.testing.assert_close(found[0], found[1])
    assert found[0][1]["block_output"].shape == (3, 17, WIDTH)


def test_timm_inside_open_clip() -> None:
    import open_clip

    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(
        embed_dim=16,
        vision_cfg={
            "timm_model_name": "vit_tiny_patch16_224",
            "timm_pool": "token",
            "timm_proj": "linear",
        },
        text_cfg={
            "context_length": LENGTH,
            "vocab_size": VOCAB,
            "width": WIDTH,
            "heads": HEADS,
            "layers": LAYERS,
        },
    ).eval()
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        plain = model.encode_image(pixels)
        with (
            bs.patched(model, "attention_bias", std=1.0),
            bs.record(model, what="probs", layers=0) as rec,
        ):
            assert not torch.equal(model.encode_image(pixels), plain)
        assert rec["probs"][0].shape == (2, 3, 197, 197)
        assert torch.equal(model.encode_image(pixels), plain)


def test_attention_output_is_what_joins_the_residual_stream() -> None:
    """Also where, as in transformers 4, the projection is beside the attention."""
    from tests import vision

    for family in ("vit", "dinov2", "clip_vision", "open_clip_vision", "hub_dinov2"):
        model = vision.planted(family)
        kept = dict[str, Tensor]()
        projection = vision.attentions(model, family)[1][1]
        if family != "open_clip_vision":  # which does not call its projection
            projection.register_forward_hook(
                lambda _, __, output, kept=kept: kept.update(output=output)
            )
        with bs.record(model, what=("attention_output", "q"), layers=1) as rec, torch.no_grad():
            model(images(2))
        if kept:
            assert torch.equal(rec["attention_output"][1], kept["output"]), family
        assert rec["attention_output"][1].shape == (2, rec["q"][1].shape[2], 64)
