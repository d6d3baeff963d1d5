"""SigLIP of transformers: image tower without [CLS], text tower that attends in both directions."""

from __future__ import annotations

from torch import nn

from biassurgery.adapters.clip import TextTower, VisionTower
from biassurgery.adapters.registry import register_adapter


@register_adapter
class SiglipVision(VisionTower):
    family = "siglip_vision"
    whole = "siglip"
    model_types = ("siglip_vision_model",)
    cls = False


@register_adapter
class SiglipText(TextTower):
    family = "siglip_text"
    whole = "siglip"
    model_types = ("siglip_text_model",)

    def causal(self, model: nn.Module) -> bool:
        return False
