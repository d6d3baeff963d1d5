"""DINOv3 ViT of transformers: rotary positions on the patches, registers."""

from __future__ import annotations

from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.transformers_vision import TransformersVision


@register_adapter
class Dinov3(TransformersVision):
    family = "dinov3_vit"
    model_types = ("dinov3_vit",)
    stacks = ("model.layer", "layer")
    mlp_outs = ("mlp.down_proj",)
