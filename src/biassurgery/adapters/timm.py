"""timm's VisionTransformer, in every prefix layout ([CLS], registers, neither)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from biassurgery.adapters.base import ImageAdapter
from biassurgery.adapters.registry import register_adapter
from biassurgery.attention.bias import Attention, Shape
from biassurgery.attention.routes import ThroughSdpa
from biassurgery.errors import UnsupportedModel


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

    def attention(self, model: nn.Module, block: nn.Module) -> Attention:
        module: Any = getattr(block, "attn", None)
        if not hasattr(module, "fused_attn"):
            raise UnsupportedModel(f"model: {type(block).__name__} has no child `attn` with `fused_attn`; modes on attention of such "
                                   "blocks need an adapter with attention().")
        heads = module.num_heads
        return Attention(module, ThroughTimm, Shape(heads, heads, module.head_dim, module.head_dim, self.width(model)))

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        model.forward_features(batch["pixel_values"])  # type: ignore[operator]


class ThroughTimm(ThroughSdpa):
    """timm's call of sdpa, also where it is told to compute the softmax by itself."""

    @classmethod
    def overrides(cls, module: nn.Module) -> dict[str, Any]:
        return {"fused_attn": True}
