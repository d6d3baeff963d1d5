"""DINOv2 as torch.hub gives it, with and without registers, its blocks in a list or chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from biassurgery.adapters.arguments import call_with
from biassurgery.adapters.image import ImageAdapter
from biassurgery.adapters.libraries import is_fsdp
from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.stacks import first_of
from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.attention import Attention, EditedAttention, Shape
from biassurgery.surgery.call import Call


@register_adapter
class HubDinov2(ImageAdapter):
    family = "hub_dinov2"

    def matches(self, model: nn.Module) -> bool:
        return any(c.__name__ == "DinoVisionTransformer" for c in type(self.part(model)).__mro__)

    def part(self, model: nn.Module) -> nn.Module:
        return getattr(model, "backbone", model)  # of the hub's classifiers

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        blocks: Any = model.blocks
        if getattr(model, "chunked_blocks", False):
            # Identities fill chunks up.
            return [
                block for chunk in blocks for block in chunk if not isinstance(block, nn.Identity)
            ]
        return list(blocks)

    def width(self, model: nn.Module) -> int:
        return model.embed_dim  # type: ignore[return-value]

    def has_cls(self, model: nn.Module) -> bool:
        return True

    def registers(self, model: nn.Module) -> int:
        return getattr(model, "num_register_tokens", 0)

    def attention(self, model: nn.Module, block: nn.Module) -> Attention:
        module: Any = getattr(block, "attn", None)
        if not all(hasattr(module, name) for name in ("qkv", "proj", "num_heads")):
            raise UnsupportedModel(
                f"model: {type(block).__name__} has no child `attn` with `qkv`, `proj` and"
                " `num_heads`; register an adapter with attention()."
            )
        heads = module.num_heads
        size = module.qkv.out_features // (3 * heads)
        shape = Shape(heads, heads, size, size, self.width(model))
        return Attention(module, ThroughDinov2, shape)

    def mlp_out(self, model: nn.Module, block: nn.Module) -> nn.Module:
        return first_of(block, ("mlp.fc2", "mlp.w3"), "the second layer of an MLP")

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        body = model if is_fsdp(model) else model.forward_features
        call_with(body, "pixel_values", batch)  # type: ignore[arg-type]


class ThroughDinov2(EditedAttention):
    """Attention that xformers, or a softmax of its own, computes inline."""

    qkv: nn.Module
    proj: nn.Module
    proj_drop: nn.Module
    attn_drop: Any
    num_heads: int
    training: bool

    def through(self, x: Tensor, attn_bias: Any = None, **others: Any) -> Tensor:
        arguments = {"attn_bias": attn_bias, **others}
        given = [name for name, value in arguments.items() if value is not None]
        if given:
            raise UnsupportedModel(
                f"model: {type(self).__name__} was given {', '.join(given)} (nested tensors: crops"
                " of several sizes in one forward); run a patched or watched model on one tensor"
                " of images at a time."
            )
        parts = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, H, d)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        rate = getattr(self.attn_drop, "p", self.attn_drop) if self.training else 0.0
        out = self.attended(Call(q, k, v, None, False, q.shape[-1] ** -0.5, rate))
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
