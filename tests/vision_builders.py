"""Small random vision transformers of every library."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.models import HEADS, HIDDEN, IMAGE, LAYERS, PATCH

TOKENS = (IMAGE // PATCH) ** 2
_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": IMAGE,
    "patch_size": PATCH,
}


def of_transformers(name: str, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        import transformers as tf

        makers: dict[str, Callable[[], Any]] = {
            "clip": lambda: tf.CLIPVisionModelWithProjection(
                tf.CLIPVisionConfig(**_SIZES, intermediate_size=128, projection_dim=5)
            ),
            "siglip": lambda: tf.SiglipForImageClassification(
                tf.SiglipConfig(vision_config={**_SIZES, "intermediate_size": 128}, num_labels=5)
            ),
            "dinov2": lambda: tf.Dinov2ForImageClassification(
                tf.Dinov2Config(**_SIZES, mlp_ratio=2, num_labels=5)
            ),
            "dinov2_with_registers": lambda: tf.Dinov2WithRegistersForImageClassification(
                tf.Dinov2WithRegistersConfig(
                    **_SIZES, mlp_ratio=2, num_register_tokens=4, num_labels=5
                )
            ),
            "dinov3_vit": lambda: tf.DINOv3ViTModel(
                tf.DINOv3ViTConfig(
                    **_SIZES, intermediate_size=128, num_register_tokens=4, layerscale_value=1.0
                )
            ),
            "vit": lambda: tf.ViTForImageClassification(
                tf.ViTConfig(**_SIZES, intermediate_size=128, num_labels=5)
            ),
            "vit_mae": lambda: ordered_mae()(
                tf.ViTMAEConfig(**_SIZES, intermediate_size=128, mask_ratio=0.0)
            ),
        }
        return makers[name]()

    return build


@cache
def ordered_mae() -> Any:
    """MAE that keeps all patches in order, where transformers' draws an order at random."""
    import transformers as tf

    class OrderedMae(tf.ViTMAEModel):  # type: ignore[misc, name-defined]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.embeddings.position_embeddings.requires_grad_(True)  # as all other parameters

        def forward(self, pixel_values: Tensor, noise: Tensor | None = None, **others: Any) -> Any:
            order = torch.arange(TOKENS, dtype=torch.float32).expand(len(pixel_values), -1)
            return super().forward(pixel_values, noise=order if noise is None else noise, **others)

    globals()["OrderedMae"] = OrderedMae  # pickle looks it up by its name
    OrderedMae.__qualname__ = "OrderedMae"
    return OrderedMae


def timm_vit() -> Any:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=IMAGE,
        patch_size=PATCH,
        embed_dim=HIDDEN,
        depth=LAYERS,
        num_heads=HEADS,
        num_classes=5,
        reg_tokens=2,
        no_embed_class=True,
        init_values=1.0,
    )


def timm_eva() -> Any:
    from timm.models.eva import Eva

    return Eva(
        img_size=IMAGE,
        patch_size=PATCH,
        embed_dim=HIDDEN,
        depth=LAYERS,
        num_heads=HEADS,
        num_classes=5,
        num_reg_tokens=2,
        no_embed_class=True,
        use_rot_pos_emb=True,
        mlp_ratio=2,
        global_pool="token",
    )


def timm_beit() -> Any:
    from timm.models.beit import Beit

    return Beit(
        img_size=IMAGE,
        patch_size=PATCH,
        embed_dim=HIDDEN,
        depth=LAYERS,
        num_heads=HEADS,
        num_classes=5,
        use_abs_pos_emb=True,
        use_rel_pos_bias=True,
        mlp_ratio=2,
        global_pool="token",
    )


def open_clip() -> Any:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(
        image_size=IMAGE,
        patch_size=PATCH,
        width=HIDDEN,
        layers=LAYERS,
        heads=HEADS,
        mlp_ratio=2,
        output_dim=5,
    )


def hub() -> Any:
    from tests.hub_dinov2 import DinoVisionTransformer

    return DinoVisionTransformer(IMAGE, PATCH, HIDDEN, LAYERS, HEADS, num_register_tokens=4)
