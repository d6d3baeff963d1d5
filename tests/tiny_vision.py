"""Tiny random vision models of every library, what their parts say in float64, and asserts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.hub_dinov2 import DinoVisionTransformer
from tests.models import images

WIDTH = 32
DEPTH = 5
CLASSES = 7
ROWS = 24
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}


@cache
def _made(family: str) -> Any:
    import transformers as tf
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(1)
    timm_sizes: dict[str, Any] = {
        "img_size": 28,
        "patch_size": 7,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": 4,
        "num_classes": CLASSES,
    }
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 49_408,
        "max_position_embeddings": 16,
    }
    made: dict[str, Callable[[], Any]] = {
        "timm": lambda: VisionTransformer(**timm_sizes),
        "timm_registers": lambda: VisionTransformer(reg_tokens=3, **timm_sizes),
        "timm_mean": lambda: VisionTransformer(global_pool="avg", fc_norm=True, **timm_sizes),
        "hub": lambda: DinoVisionTransformer(28, 7, WIDTH, DEPTH, 4),
        "hub_registers": lambda: DinoVisionTransformer(
            28, 7, WIDTH, DEPTH, 4, num_register_tokens=2, block_chunks=2
        ),
        "dinov2": lambda: tf.Dinov2Model(tf.Dinov2Config(**VISION)),
        "dinov2_registers": lambda: tf.Dinov2WithRegistersModel(
            tf.Dinov2WithRegistersConfig(num_register_tokens=3, **VISION)
        ),
        "dinov2_classifier": lambda: tf.Dinov2ForImageClassification(
            tf.Dinov2Config(num_labels=CLASSES, **VISION)
        ),
        "vit": lambda: tf.ViTModel(tf.ViTConfig(**VISION)),
        "mae": lambda: tf.ViTMAEModel(tf.ViTMAEConfig(**VISION)),
        "clip": lambda: tf.CLIPModel(
            tf.CLIPConfig(
                text_config={**text, "eos_token_id": 49_407},
                vision_config=VISION,
                projection_dim=24,
            )
        ),
        "clip_vision": lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**VISION)),
        "clip_projected": lambda: tf.CLIPVisionModelWithProjection(
            tf.CLIPVisionConfig(projection_dim=24, **VISION)
        ),
        "siglip": lambda: tf.SiglipModel(tf.SiglipConfig(text_config=text, vision_config=VISION)),
        "open_clip": _open_clip,
    }
    model = made[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(
                    torch.randn_like(parameter) * (0.5 if parameter.numel() < 10_000 else 0.3)
                )
    return model


def _open_clip() -> Any:
    from open_clip.model import CLIP

    vision: Any = dict(image_size=28, patch_size=7, width=WIDTH, layers=DEPTH, head_width=8)
    text: Any = dict(context_length=16, vocab_size=49_408, width=WIDTH, heads=4, layers=2)
    return CLIP(24, vision, text)


def tiny(family: str) -> Any:
    """A small random model of a family in eval mode; a new object each time."""
    return copy.deepcopy(_made(family))


def double(model: Any) -> Any:
    return copy.deepcopy(model).double()


def pictures(rows: int = ROWS, seed: int = 2) -> Tensor:
    return images(rows, seed) * 2


def split(
    pixels: Tensor, labels: Any, sizes: tuple[int, ...] = (5, 1, 11, 7)
) -> list[tuple[Tensor, Tensor]]:
    """Uneven batches."""
    return list(zip(pixels.split(sizes), torch.as_tensor(labels).split(sizes)))


def check(
    accuracy: Callable[[list[tuple[Tensor, Tensor]]], float],
    pixels: Tensor,
    said: list[int],
    classes: int = CLASSES,
) -> None:
    """Assert that the answers are `said`, exactly: all, none, and every third."""
    assert len(set(said)) > 2  # else one answer for all would pass
    right = torch.tensor(said)
    assert accuracy(split(pixels, right)) == 1.0
    assert accuracy(split(pixels, (right + 1) % classes)) == 0.0
    assert (
        accuracy(
            split(
                pixels, torch.where(torch.arange(len(said)) % 3 == 0, right, (right + 2) % classes)
            )
        )
        == 1 / 3
    )


def winners(scores: Tensor) -> list[int]:
    """The largest of each row (B, C), which must lead clearly enough for float32."""
    best = scores.topk(2).values
    assert ((best[:, 0] - best[:, 1]) / scores.abs().amax(1)).min() > 1e-5
    return scores.argmax(1).tolist()


def blocks_by_hand(family: str, model: Any, x: Tensor) -> list[Tensor]:
    """The output of every block, from the model's parts."""
    if family.startswith("hub"):
        x = model.prepare_tokens_with_masks(x)
        stack = [block for block in model.modules() if hasattr(block, "attn")]
    elif family.startswith("timm"):
        x = model._pos_embed(model.patch_embed(x))
        stack = list(model.blocks)
    else:
        base = model.base_model
        x = base.embeddings(x)
        stack = list(base.encoder.layer) if hasattr(base, "encoder") else list(base.layers)
    states = []
    for block in stack:
        x = block(x)
        x = x if isinstance(x, Tensor) else x[0]
        states.append(x)
    return states


def norm_of(model: Any) -> Any:
    base = getattr(model, "base_model", model)
    return base.layernorm if hasattr(base, "layernorm") else base.norm


REGISTERS = {"timm_registers": 3, "hub_registers": 2, "dinov2_registers": 3}
WITH_CLS = (
    "timm",
    "timm_registers",
    "hub",
    "hub_registers",
    "dinov2",
    "dinov2_registers",
    "dinov2_classifier",
    "vit",
)


@torch.no_grad()
def linear_input(family: str, model: Any, x: Tensor, layers: int) -> Tensor:
    """What the published heads of DINOv2 read (dinov2/hub/classifiers.py), in float64."""
    model = double(model)
    x = x.double()
    normed = [norm_of(model)(state) for state in blocks_by_hand(family, model, x)[-layers:]]
    patches = normed[-1][:, 1 + REGISTERS.get(family, 0) :]
    assert patches.shape[1] == 16
    return torch.cat([*(state[:, 0] for state in normed), patches.sum(1) / 16], 1)
