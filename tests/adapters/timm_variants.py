"""Transformers of timm with each of the options that they are built with, and their attention
written out in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

WIDTH = 32
DEPTH = 3
HEADS = 4
IMAGE = 32
PATCH = 8
SIZES: dict[str, Any] = {
    "img_size": IMAGE,
    "patch_size": PATCH,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": HEADS,
    "num_classes": 7,
}
ROPE: dict[str, Any] = {"use_rot_pos_emb": True, "swiglu_mlp": True, "num_reg_tokens": 2}
GQA: dict[str, Any] = {
    "attn_type": "rope",
    "qkv_fused": False,
    "num_kv_heads": (4, 2, 4),
    "qk_norm": True,
}
AVERAGE: dict[str, Any] = {"class_token": False, "global_pool": "avg"}


def vit(**options: Any) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**SIZES, **options)


def gated() -> Any:
    from timm.layers.attention import Attention

    class Gated(Attention):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, gated=True, **kwargs)

    return vit(attn_layer=Gated)


def block(name: str, **options: Any) -> Any:
    from timm.models import vision_transformer

    return vit(block_fn=getattr(vision_transformer, name), **options)


def fused_projections() -> Any:
    from timm.models.vision_transformer import ParallelScalingBlock

    class OneProjection(ParallelScalingBlock):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, fuse_out_proj=True, **kwargs)

    return vit(block_fn=OneProjection)


def distilled() -> Any:
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(**SIZES)


def eva(**options: Any) -> Any:
    from timm.models.eva import Eva

    return Eva(**SIZES, **options)


def relative(**options: Any) -> Any:
    from timm.models.vision_transformer_relpos import VisionTransformerRelPos

    return VisionTransformerRelPos(**SIZES, init_values=0.5, **options)


def beit() -> Any:
    from timm.models.beit import Beit

    return Beit(**SIZES, use_rel_pos_bias=True, use_abs_pos_emb=False)


def naflex(**options: Any) -> Any:
    import timm

    sizes = {name: size for name, size in SIZES.items() if name != "img_size"}
    return timm.create_model("naflexvit_base_patch16_gap", **sizes, init_values=0.5, **options)


def from_classic() -> Any:
    import timm

    return timm.create_model("vit_base_patch16_224", use_naflex=True, **SIZES)


def qwen() -> Any:
    import timm

    sizes = {name: size for name, size in SIZES.items() if name != "num_classes"}
    return timm.create_model("qwen3_vit_88m_enc", **sizes, out_features=WIDTH)


# How each is built, and the roles that its prefix tokens have.
REGISTERS = ("register:0", "register:1")
PARALLEL = ("parallel", "parallel_qk_norm", "parallel_fused_projections")
VARIANTS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "plain": (vit, ("cls",)),
    "qk_norm": (partial(vit, qk_norm=True), ("cls",)),
    "scale_norm": (partial(vit, scale_attn_norm=True, scale_mlp_norm=True), ("cls",)),
    "gated": (gated, ("cls",)),
    "layer_scale": (partial(vit, init_values=0.5), ("cls",)),
    "post_norm": (partial(block, "ResPostBlock", init_values=0.5), ("cls",)),
    "average": (partial(vit, **AVERAGE), ()),
    "registers": (partial(vit, reg_tokens=2, no_embed_class=False), ("cls", *REGISTERS)),
    "registers_apart": (partial(vit, reg_tokens=2, no_embed_class=True), ("cls", *REGISTERS)),
    "registers_average": (partial(vit, reg_tokens=2, no_embed_class=True, **AVERAGE), REGISTERS),
    "distilled": (distilled, ("cls", "distillation")),
    "parallel": (partial(block, "ParallelScalingBlock"), ("cls",)),
    "parallel_qk_norm": (
        partial(block, "ParallelScalingBlock", qk_norm=True, qkv_bias=False, init_values=0.5),
        ("cls",),
    ),
    "parallel_fused_projections": (fused_projections, ("cls",)),
    "eva": (partial(eva, **ROPE), ("cls", *REGISTERS)),
    "eva_apart": (
        partial(eva, **ROPE, no_embed_class=True, qkv_fused=False, scale_attn_inner=True),
        ("cls", *REGISTERS),
    ),
    "eva_grouped": (partial(eva, **ROPE, **GQA), ("cls", *REGISTERS)),
    "eva_mixed": (
        partial(eva, use_rot_pos_emb=True, rope_type="mixed", attn_type="rope"),
        ("cls",),
    ),
    "relative": (relative, ()),
    "relative_cls": (partial(relative, class_token=True, global_pool="token"), ("cls",)),
    "beit": (beit, ("cls",)),
    "naflex": (partial(naflex, reg_tokens=2), REGISTERS),
    "naflex_gated": (
        partial(naflex, attn_gated=True, rope_type="axial", class_token=True, reg_tokens=0),
        ("cls",),
    ),
    "naflex_from_classic": (from_classic, ("cls",)),
    "qwen": (qwen, ()),
}
DYNAMIC: dict[str, Callable[[], Any]] = {
    "vit": partial(vit, dynamic_img_size=True, reg_tokens=2),
    "vit_padded": partial(vit, dynamic_img_size=True, dynamic_img_pad=True),
    "eva": partial(eva, **ROPE, dynamic_img_size=True),
    "naflex": partial(naflex, reg_tokens=2),
    "qwen": qwen,
}


def seeded(model: Any) -> Any:
    """The model in float64, with weights that let every part matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5
                )
    return model.eval().double()


def built(name: str) -> Any:
    torch.manual_seed(0)  # timm draws what is not drawn anew
    return seeded(VARIANTS[name][0]())


def images(rows: int = 2, size: tuple[int, int] = (IMAGE, IMAGE)) -> Tensor:
    return torch.randn(
        rows, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


class WrittenOut(TorchFunctionMode):
    """Within it sdpa is a softmax over the keys and one column more, of the key and value (H, d)
    that belong to the layer at hand.
    """

    def __init__(self, biases: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.biases = iter(biases)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (
            self.attend(*args, **(kwargs or {}))
            if func is scaled_dot_product_attention
            else func(*args, **(kwargs or {}))
        )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        assert (is_causal, dropout_p, q.dtype) == (False, 0.0, torch.float64)
        key, value = next(self.biases)
        q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
        logits = torch.einsum("bhtd,bhsd->bhts", q, k)
        logits = logits if attn_mask is None else logits + attn_mask
        column = torch.einsum("bhtd,hd->bht", q, key)
        probs = torch.cat([logits, column[..., None]], -1).softmax(-1)
        return probs[..., :-1] @ v + probs[..., -1:] * value[:, None]


def biases(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The parameters that a kv bias added, layer by layer, from the state dict."""
    state = model.state_dict()
    keys = [name for name in state if name.endswith("attention_bias_kv.k_bias")]
    return [(state[name], state[name.replace("k_bias", "v_bias")]) for name in keys]
