"""timm's VisionTransformer, in every prefix layout ([CLS], registers, neither)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from biassurgery.adapters.base import ImageAdapter
from biassurgery.adapters.registry import register_adapter


@register_adapter
class TimmVisionTransformer(ImageAdapter):
    family = "timm_vit"

    def matches(self, model: nn.Module) -> bool:
        return any(c.__module__ == "timm.models.vision_transformer" and c.__name__ == "VisionTransformer" for c in type(model).__mro__)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.blocks)  # type: ignore[arg-type]

    def width(self, model: nn.Module) -> int:
        return model.embed_dim  # type: ignore[return-value]

    def has_cls(self, model: nn.Module) -> bool:
        return model.cls_token is not None

    def registers(self, model: nn.Module) -> int:
        return model.num_reg_tokens  # type: ignore[return-value]

    def roles(self, model: nn.Module) -> tuple[str, ...]:
        cls, *rest = super().roles(model)
        return (cls, "distillation", *rest) if hasattr(model, "dist_token") else (cls, *rest)  # the second token of DeiT

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        model.forward_features(batch["pixel_values"])  # type: ignore[operator]
