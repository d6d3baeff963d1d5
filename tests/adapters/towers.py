"""Small models of an image tower and a text tower, and what they are run on."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

WIDTH = 32
HEADS = 2
LAYERS = 3
VOCAB = 64
LENGTH = 8
SIZE = 28
END = VOCAB - 1  # the highest id ends a text, as CLIP's does


def _transformers(kind: str) -> Any:
    import transformers as tf

    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": SIZE,
        "patch_size": 7,
    }
    text = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": LENGTH,
        "bos_token_id": 0,
        "eos_token_id": END,
        "pad_token_id": 1,
    }
    if kind == "clip":
        return tf.CLIPModel(
            tf.CLIPConfig(
                text_config={**text, "projection_dim": 16},
                vision_config={**vision, "projection_dim": 16},
                projection_dim=16,
            )
        )
    return tf.SiglipModel(
        tf.SiglipConfig(text_config={**text, "projection_size": WIDTH}, vision_config=vision)
    )


def _open_clip(**options: Any) -> Any:
    import open_clip

    kind = open_clip.CustomTextCLIP if options.pop("custom", False) else open_clip.CLIP
    vision = {
        "image_size": SIZE,
        "layers": LAYERS,
        "width": WIDTH,
        "head_width": 16,
        "patch_size": 7,
    }
    text = {
        "context_length": LENGTH,
        "vocab_size": VOCAB,
        "width": WIDTH,
        "heads": HEADS,
        "layers": LAYERS,
    }
    return kind(embed_dim=16, vision_cfg=vision | options, text_cfg=text | options)


MODELS = {
    "clip": lambda: _transformers("clip"),
    "siglip": lambda: _transformers("siglip"),
    "open_clip": _open_clip,
    "open_clip custom": lambda: _open_clip(custom=True),
    "open_clip sdpa": lambda: _open_clip(custom=True, qk_norm=True),
}
every_model = pytest.mark.parametrize("name", MODELS)


@cache
def _built(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(0.2 / p.std().clamp(min=0.01))
    return model


def build(name: str) -> Any:
    return copy.deepcopy(_built(name))


def images(rows: int = 2) -> Tensor:
    return torch.randn(rows, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def texts(rows: int = 2) -> Tensor:
    ids = torch.randint(2, END, (rows, LENGTH), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = 0
    ids[:, -1] = END
    return ids


def pooled(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


@torch.no_grad()
def seen(model: Any) -> dict[str, Tensor]:
    """The embeddings of images and of texts."""
    if hasattr(model, "encode_image"):
        return {"vision": model.encode_image(images()), "text": model.encode_text(texts())}
    return {
        "vision": pooled(model.get_image_features(pixel_values=images())),
        "text": pooled(model.get_text_features(input_ids=texts())),
    }
