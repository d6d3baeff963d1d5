"""timm's vision transformers in every prefix layout, alone or inside open_clip.

[CLS], distillation token, registers, none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from biassurgery.adapters.arguments import call_with
from biassurgery.adapters.image import ImageAdapter
from biassurgery.adapters.libraries import is_fsdp, is_of
from biassurgery.adapters.registry import register_adapter
from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.attention import Attention, Shape
from biassurgery.surgery.routes import ThroughSdpa


class TimmTransformer(ImageAdapter):
    """A timm model of one stack of blocks on tokens (B, T, D).

    Attributes:
        classes: the names of the classes that it serves, subclasses included.
    """

    classes: ClassVar[tuple[str, ...]]

    def matches(self, model: nn.Module) -> bool:
        return is_of(self.part(model), "timm.models", *self.classes)

    def part(self, model: nn.Module) -> nn.Module:
        # open_clip keeps timm's models there.
        return getattr(getattr(model, "visual", None), "trunk", model)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.blocks)  # type: ignore[arg-type]

    def width(self, model: nn.Module) -> int:
        return model.embed_dim  # type: ignore[return-value]

    def has_cls(self, model: nn.Module) -> bool:
        # NaFlexVit keeps its embeddings in `embeds`.
        return getattr(getattr(model, "embeds", model), "cls_token", None) is not None

    def registers(self, model: nn.Module) -> int:
        prefix = getattr(model, "num_prefix_tokens", 0)
        return prefix - self.has_cls(model) - hasattr(model, "dist_token")

    def roles(self, model: nn.Module) -> tuple[str, ...]:
        first, *rest = super().roles(model)
        # The second token of DeiT.
        distillation = ("distillation",) if hasattr(model, "dist_token") else ()
        return (first, *distillation, *rest)

    def attention(self, model: nn.Module, block: nn.Module) -> Attention:
        module: Any = getattr(block, "attn", block)
        if not hasattr(module, "fused_attn") or not hasattr(module, "num_heads"):
            raise UnsupportedModel(
                f"model: {type(block).__name__} has several attentions side by side, or none that"
                " calls scaled_dot_product_attention; modes on attention do not apply to it."
            )
        if any(name.startswith("lambda") for name, _ in module.named_parameters()):
            raise UnsupportedModel(
                f"model: {type(module).__name__} is the difference of two attentions, which are not"
                " one softmax; modes on attention do not apply to it."
            )
        heads = module.num_heads
        size = getattr(module, "head_dim", None) or module.qkv.out_features // (3 * heads)
        route = ThroughParallel if module is block else ThroughTimm
        return Attention(module, route, Shape(heads, heads, size, size, self.width(model)))

    def mlp_out(self, model: nn.Module, block: nn.Module) -> nn.Module:
        layer = getattr(getattr(block, "mlp", None), "fc2", None)
        return super().mlp_out(model, block) if layer is None else layer

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        body = model if is_fsdp(model) else model.forward_features
        call_with(body, "pixel_values", batch)  # type: ignore[arg-type]


class ThroughTimm(ThroughSdpa):
    """timm's call of sdpa, also where it is told to compute the softmax by itself."""

    @property
    def fused_attn(self) -> bool:
        return True


class ThroughParallel(ThroughTimm):
    """The same inside a block whose attention and MLP are one module (Dehghani et al. 2023).

    They share their projections.
    """

    @classmethod
    def check_input(cls) -> None:
        raise UnsupportedModel(
            "model: attention and MLP of its blocks share their projections, so that what the"
            " attention alone reads and returns is at hand nowhere; use another kind than 'gate',"
            " and leave 'norm_output' and 'attention_output' out of record()."
        )


@register_adapter
class TimmVisionTransformer(TimmTransformer):
    family = "timm_vit"
    classes = ("VisionTransformer", "NaFlexVit")


@register_adapter
class TimmRelativePositions(TimmTransformer):
    """BEiT and ViTs with relative positions, which come to the softmax as a mask."""

    family = "timm_relative"
    classes = ("Beit", "VisionTransformerRelPos")

    def prefix_counters(self, model: nn.Module, block: nn.Module) -> list[str]:
        raise UnsupportedModel(
            f"model: {type(model).__name__} has a table of relative positions for the tokens that"
            " it was made with, so that none can be added."
        )


@register_adapter
class TimmEva(TimmTransformer):
    """EVA-02, and what timm builds from its class (PE, DINOv3, ViT-RoPE): rotary, SwiGLU."""

    family = "timm_eva"
    classes = ("Eva",)


@register_adapter
class TimmEncoder(TimmTransformer):
    """The vision encoders of multimodal models: patches only, rotary positions.

    Alone or inside a classifier.
    """

    family = "timm_encoder"
    classes = ("DeepseekVitEncoder", "Gemma4VitEncoder", "Qwen3VitEncoder")

    def part(self, model: nn.Module) -> nn.Module:
        return getattr(super().part(model), "encoder", super().part(model))
