"""What an adapter says of its model: grid, causality, towers, the last linear of an MLP."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import biassurgery as bs
from biassurgery.adapters.registry import find_host
from biassurgery.errors import UnsupportedModel


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_the_last_layer_of_a_gated_mlp(kind: str) -> None:
    import transformers as tf

    config = getattr(tf, f"{kind}Config")(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        use_swiglu_ffn=True,
    )
    host = find_host(getattr(tf, f"{kind}Model")(config))
    last: Any = host.adapter.mlp_out(host.model, host.blocks[0])  # type: ignore[attr-defined]
    assert last.out_features == 32
    assert last.in_features > 32


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_patches_that_are_not_square(library: str) -> None:
    import transformers as tf
    from timm.models.vision_transformer import VisionTransformer

    if library == "timm":
        model: Any = VisionTransformer(
            img_size=(64, 32), patch_size=(16, 4), embed_dim=32, depth=2, num_heads=2
        )  # type: ignore[arg-type]
    else:
        model = tf.ViTModel(
            tf.ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                image_size=(64, 32),
                patch_size=(16, 4),
            )
        )
    assert bs.detect(model, torch.randn(1, 3, 64, 32)).grid == (4, 8)


def test_encoders_that_see_both_ways_are_not_taken_for_causal_ones() -> None:
    import transformers as tf

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 50,
    }
    for model, causal in (
        (tf.BertModel(tf.BertConfig(**sizes)), False),
        (tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)), True),
    ):
        host = find_host(model)
        assert host.adapter.causal(host.model) is causal


def test_a_softmax_of_its_own_in_a_tower_is_refused() -> None:
    import transformers as tf

    text = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 50,
    }
    image = {**text, "image_size": 28, "patch_size": 7}
    del image["vocab_size"]
    model = tf.BlipModel(
        tf.BlipConfig(text_config={**text, "encoder_hidden_size": 32}, vision_config=image)
    )
    with pytest.raises(UnsupportedModel, match="BlipVisionModel has 0 modules that call"):
        bs.patch_model(model, "attention_bias")
