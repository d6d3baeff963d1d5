"""Tiny random vision transformers with massive activations planted in their weights, in every
library; see tests/models.py for how.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import (
    CHANNEL,
    DELIMITER,
    HEADS,
    HIDDEN,
    IMAGE,
    KEYS,
    LAYER,
    LAYERS,
    PATCH,
    PATCHES,
    START,
    clear,
    grow,
    images,
)

TOKENS = (IMAGE // PATCH) ** 2
_EMBEDDINGS = (
    "embed",
    "cls_token",
    "reg_token",
    "register_token",
    "conv1",
)  # in the names of what makes the first hidden state
_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": IMAGE,
    "patch_size": PATCH,
}


@dataclass(frozen=True)
class Family:
    """One kind of vision transformer; a path that differs by version is a tuple of alternatives.

    Attributes:
        build: makes a random one.
        library: whose version decides what it is.
        blocks: where the block list is.
        attention, projection, reader, writer: the attention, its output projection, and the two
            layers of the MLP, in a block.
        prefix: tokens before the patches.
        registers: how many of them are registers.
        marks: the rows of the embeddings that are given a key, first that of the start token of
            text, then that of its delimiter.
        tokens: the tokens that are so marked, in the same order.
        gain: how much more than other weights those of the attention's output are; it takes more
            behind a first normalisation.
    """

    build: Callable[[], Any]
    library: str
    blocks: tuple[str, ...]
    attention: tuple[str, ...]
    projection: tuple[str, ...]
    reader: tuple[str, ...] = ("mlp.fc1",)
    writer: tuple[str, ...] = ("mlp.fc2",)
    prefix: int = 1
    registers: int = 0
    marks: tuple[tuple[str, tuple[int, ...]], ...] = ()
    tokens: tuple[int, ...] = ()
    gain: float = 3.0


def _transformers(name: str, **options: Any) -> Callable[[], Any]:
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


def _timm_vit() -> Any:
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


def _timm_eva() -> Any:
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


def _timm_beit() -> Any:
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


def _open_clip() -> Any:
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


def _hub() -> Any:
    from tests.hub_dinov2 import DinoVisionTransformer

    return DinoVisionTransformer(IMAGE, PATCH, HIDDEN, LAYERS, HEADS, num_register_tokens=4)


def _patches(prefix: int) -> tuple[int, ...]:
    return tuple(patch + prefix for patch in PATCHES)


# In transformers 4, then 5.
_INNER = {
    "attention": ("attention.attention", "attention"),
    "projection": ("attention.output.dense", "attention.o_proj"),
}
_TIMM = {
    "library": "timm",
    "blocks": ("blocks",),
    "attention": ("attn",),
    "projection": ("attn.proj",),
}

FAMILIES: dict[str, Family] = {
    "timm_vit": Family(
        _timm_vit,
        **_TIMM,
        prefix=3,
        registers=2,
        marks=(("pos_embed", PATCHES),),
        tokens=_patches(3),
    ),
    "timm_eva": Family(
        _timm_eva,
        **_TIMM,
        prefix=3,
        registers=2,
        marks=(("pos_embed", PATCHES),),
        tokens=_patches(3),
    ),
    "timm_relative": Family(
        _timm_beit, **_TIMM, marks=(("pos_embed", _patches(1)),), tokens=_patches(1)
    ),
    "clip_vision": Family(
        _transformers("clip"),
        "transformers",
        ("vision_model.encoder.layers",),
        ("self_attn",),
        ("self_attn.out_proj",),
        marks=(("vision_model.embeddings.position_embedding.weight", _patches(1)),),
        tokens=_patches(1),
        gain=12.0,
    ),
    "siglip_vision": Family(
        _transformers("siglip"),
        "transformers",
        ("vision_model.encoder.layers",),
        ("self_attn",),
        ("self_attn.out_proj",),
        prefix=0,
        marks=(("vision_model.embeddings.position_embedding.weight", PATCHES),),
        tokens=PATCHES,
    ),
    "dinov2": Family(
        _transformers("dinov2"),
        "transformers",
        ("dinov2.encoder.layer",),
        **_INNER,
        marks=(("dinov2.embeddings.position_embeddings", _patches(1)),),
        tokens=_patches(1),
    ),
    "dinov2_with_registers": Family(
        _transformers("dinov2_with_registers"),
        "transformers",
        ("dinov2_with_registers.encoder.layer",),
        **_INNER,
        prefix=5,
        registers=4,
        marks=(("dinov2_with_registers.embeddings.position_embeddings", _patches(1)),),
        tokens=_patches(5),
    ),
    "dinov3_vit": Family(
        _transformers("dinov3_vit"),
        "transformers",
        ("model.layer", "layer"),
        ("attention",),
        ("attention.o_proj",),
        ("mlp.up_proj",),
        ("mlp.down_proj",),
        prefix=5,
        registers=4,
        marks=(("embeddings.cls_token", (0,)), ("embeddings.register_tokens", (1,))),
        tokens=(0, 2),
        gain=6.0,
    ),
    "vit": Family(
        _transformers("vit"),
        "transformers",
        ("vit.encoder.layer", "vit.layers"),
        **_INNER,
        reader=("intermediate.dense", "mlp.fc1"),
        writer=("output.dense", "mlp.fc2"),
        marks=(("vit.embeddings.position_embeddings", _patches(1)),),
        tokens=_patches(1),
    ),
    "vit_mae": Family(
        _transformers("vit_mae"),
        "transformers",
        ("encoder.layer", "layers"),
        **_INNER,
        reader=("intermediate.dense", "mlp.fc1"),
        writer=("output.dense", "mlp.fc2"),
        marks=(("embeddings.position_embeddings", _patches(1)),),
        tokens=_patches(1),
        gain=6.0,
    ),
    "open_clip_vision": Family(
        _open_clip,
        "open_clip_torch",
        ("transformer.resblocks",),
        ("attn",),
        ("attn.out_proj",),
        ("mlp.c_fc",),
        ("mlp.c_proj",),
        marks=(("positional_embedding", _patches(1)),),
        tokens=_patches(1),
        gain=12.0,
    ),
    "hub_dinov2": Family(
        _hub,
        "torch",
        ("blocks",),
        ("attn",),
        ("attn.proj",),
        prefix=5,
        registers=4,
        marks=(("pos_embed", _patches(1)),),
        tokens=_patches(5),
    ),
}


def first(module: nn.Module, paths: tuple[str, ...]) -> nn.Module:
    """The first of several submodules that there is."""
    for path in paths:
        try:
            return module.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError(f"{type(module).__name__} has none of {paths}")


def blocks(model: nn.Module, family: str) -> list[nn.Module]:
    """The transformer layers of a planted model, found without the library under test."""
    return list(first(model, FAMILIES[family].blocks).children())


def attentions(model: nn.Module, family: str) -> list[tuple[nn.Module, nn.Module]]:
    """The attention of every layer with its output projection."""
    kind = FAMILIES[family]
    return [
        (first(block, kind.attention), first(block, kind.projection))
        for block in blocks(model, family)
    ]


def planted(family: str) -> Any:
    """A planted vision transformer in eval mode; a new object each time."""
    return copy.deepcopy(_planted(family))


@cache
def _planted(family: str) -> Any:
    kind = FAMILIES[family]
    torch.manual_seed(0)
    model = kind.build().eval()
    layers = blocks(model, family)
    inside = {id(p) for block in layers for p in block.parameters()}
    named = dict(model.named_parameters())
    writers = [first(block, paths) for block in layers for paths in (kind.projection, kind.writer)]
    sources = [
        _rows(p)
        for name, p in named.items()
        if id(p) not in inside
        and any(part in name for part in _EMBEDDINGS)
        and (p.dim() != 1 or "norm" not in name)
    ]
    with torch.no_grad():
        for p in named.values():
            if p.dim() > 1 and p.std() > 0:
                p.mul_(
                    0.06 / p.std()
                )  # so that each part has an effect, and no hidden state is large by itself
        for block in layers:
            first(block, kind.projection).weight.mul_(kind.gain)  # type: ignore[union-attr, operator]
        for source in sources:
            clear(source, *KEYS.values())
        for writer in writers:
            clear(writer.weight.T, *KEYS.values(), CHANNEL)  # type: ignore[operator, union-attr]
            clear(writer.bias[None], *KEYS.values(), CHANNEL)  # type: ignore[index]
        for (name, rows), key in zip(kind.marks, KEYS):
            _rows(named[name])[list(rows), KEYS[key]] = 4.0
        reader, writer = (
            first(layers[LAYER], paths).weight.data for paths in (kind.reader, kind.writer)
        )  # type: ignore[union-attr]
        at = iter(kind.tokens)
        for (_, rows), key, level in zip(kind.marks, KEYS, (START, DELIMITER)):
            grow(
                model,
                layers[LAYER],
                [reader],
                [writer],
                images(8),
                torch.tensor([next(at) for _ in rows]),
                key,
                level,
            )  # type: ignore[list-item]
    return model


def _rows(parameter: Tensor) -> Tensor:
    """A parameter as (N, D), sharing its memory: what it adds to the channels of hidden states."""
    if parameter.dim() == 4:  # a convolution
        return parameter.data.flatten(1).T
    return (
        parameter.data.reshape(-1, parameter.shape[-1])
        if parameter.dim() > 1
        else parameter.data[None]
    )
