"""open_clip's own towers. Image towers that are timm's are served by its adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.arguments import call_with
from biassurgery.adapters.base import PADDING
from biassurgery.adapters.image import ImageAdapter
from biassurgery.adapters.libraries import is_of
from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.text import TextAdapter
from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.attention import Attention, Shape
from biassurgery.surgery.multihead import ThroughMultihead, check_multihead
from biassurgery.surgery.routes import ThroughSdpa


def _blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.transformer.resblocks)  # type: ignore[union-attr, arg-type]


def _layout(model: nn.Module) -> str:
    return "BTD" if model.transformer.batch_first else "TBD"  # type: ignore[union-attr]


def _attention(model: nn.Module, block: nn.Module, width: int) -> Attention:
    """nn.MultiheadAttention, or open_clip's own attention that calls sdpa."""
    module: Any = getattr(block, "attn", None)
    if isinstance(module, nn.MultiheadAttention):
        check_multihead(module)
        return Attention(module, ThroughMultihead, _shape(module, width))
    if not hasattr(module, "use_fsdpa") or module.logit_scale is not None:
        raise UnsupportedModel(
            f"model: a block of {type(model).__name__} has {type(module).__name__}, whose softmax"
            " is not that of nn.MultiheadAttention or sdpa itself (scaled cosine, or wrapped by"
            " PEFT); modes on attention do not apply to it."
        )
    return Attention(module, ThroughSdpa, _shape(module, width))


def _shape(module: Any, width: int) -> Shape:
    return Shape(module.num_heads, module.num_heads, module.head_dim, module.head_dim, width)


@register_adapter
class OpenClipVision(ImageAdapter):
    family = "open_clip_vision"

    def matches(self, model: nn.Module) -> bool:
        return is_of(self.part(model), "open_clip", "VisionTransformer")

    def part(self, model: nn.Module) -> nn.Module:
        return getattr(model, "visual", model)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return _blocks(model)

    def width(self, model: nn.Module) -> int:
        return model.class_embedding.shape[0]  # type: ignore[union-attr, return-value]

    def layout(self, model: nn.Module) -> str:
        return _layout(model)

    def has_cls(self, model: nn.Module) -> bool:
        return True

    def registers(self, model: nn.Module) -> int:
        return 0

    def attention(self, model: nn.Module, block: nn.Module) -> Attention:
        return _attention(model, block, self.width(model))

    def mlp_out(self, model: nn.Module, block: nn.Module) -> nn.Module:
        return block.get_submodule("mlp.c_proj")

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        call_with(model, "pixel_values", batch)


@register_adapter
class OpenClipText(TextAdapter):
    """The text tower: a module of its own or, in the plain CLIP class, parts of the model."""

    family = "open_clip_text"
    entry = "blocks"  # encode_text of the plain CLIP class enters no module as a whole

    def matches(self, model: nn.Module) -> bool:
        return is_of(self.part(model), "open_clip", "CLIP", "TextTransformer")

    def part(self, model: nn.Module) -> nn.Module:
        return getattr(model, "text", model)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return _blocks(model)

    def width(self, model: nn.Module) -> int:
        return model.token_embedding.embedding_dim  # type: ignore[union-attr, return-value]

    def vocabulary(self, model: nn.Module) -> int | None:
        return model.token_embedding.num_embeddings  # type: ignore[union-attr, return-value]

    def layout(self, model: nn.Module) -> str:
        return _layout(model)

    def causal(self, model: nn.Module) -> bool:
        return model.attn_mask is not None

    def token_roles(
        self, model: nn.Module, batch: Mapping[str, Any], shape: tuple[int, int]
    ) -> Tensor:
        """As in every text model; behind the end of the text comes padding that nothing tells.

        The end has the highest id.
        """
        roles = super().token_roles(model, batch, shape)
        pool_type = getattr(model, "text_pool_type", getattr(model, "pool_type", ""))
        if pool_type != "argmax" or "attention_mask" in batch:
            return roles
        end = batch["input_ids"].argmax(1, keepdim=True)
        return torch.where(torch.arange(shape[1], device=roles.device) > end, PADDING, roles)

    def attention(self, model: nn.Module, block: nn.Module) -> Attention:
        return _attention(model, block, self.width(model))

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        encode: Any = getattr(model, "encode_text", model.forward)
        # The model infers the mask by itself.
        unmasked = {name: value for name, value in batch.items() if name != "attention_mask"}
        call_with(encode, "input_ids", unmasked)
