"""ViT of transformers."""

from __future__ import annotations

from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.transformers_vision import TransformersVision


@register_adapter
class Vit(TransformersVision):
    family = "vit"
    model_types = ("vit",)
    stacks = ("layers", "encoder.layer", "vit.layers", "vit.encoder.layer")
