"""Tiny whole models of images and text, which make positions of their own, and batches for them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor

from biassurgery.adapters.registry import find_host

WIDTH = 64
VOCAB = 64
IMAGE = 5  # the id in whose place an image's embeddings are put
VISION_START, VIDEO = 6, 7
START = 1
SPOTS = range(4, 8)  # where the image stands in a sequence that has its start token

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": START,
    "eos_token_id": 2,
    "max_position_embeddings": 128,
}
SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": WIDTH,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "embed_dim": 32,
    "hidden_size": WIDTH,
    "num_heads": 2,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}


def paligemma() -> Any:
    config = transformers.PaliGemmaConfig(
        vision_config=SIGLIP,
        text_config={"model_type": "gemma", **TEXT},
        image_token_index=IMAGE,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def gemma3() -> Any:
    config = transformers.Gemma3Config(
        vision_config=SIGLIP,
        text_config={
            **TEXT,
            "sliding_window": 8,
            "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
        },
        image_token_index=IMAGE,
        mm_tokens_per_image=len(SPOTS),
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def llava() -> Any:
    config = transformers.LlavaConfig(
        vision_config=SIGLIP,
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "type": "mrope", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    name = "rope_parameters" if int(transformers.__version__[0]) > 4 else "rope_scaling"
    config = transformers.Qwen2VLConfig(
        vision_config=QWEN_VISION,
        text_config={**TEXT, name: rope},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=8,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


BUILDERS = {build.__name__: build for build in (paligemma, gemma3, llava, qwen2_vl)}


def whole_model(name: str) -> Any:
    """A random model whose start token is a constant, whatever it attends to, and is missed."""
    torch.manual_seed(0)
    model = BUILDERS[name]().eval()
    with torch.no_grad():
        for block in find_host(model).blocks:
            for parameter in block.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, 0.15)
        model.get_input_embeddings().weight[START, 7] = 1e4
    return model


def with_image(name: str, rows: int = 2) -> tuple[Tensor, dict[str, Any]]:
    """Token ids (rows, 12) with a start token and an image, and what else the image needs."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(10, 60, (rows, 12), generator=generator)
    ids[:, 0] = START
    ids[:, SPOTS] = IMAGE
    if not name.startswith("qwen"):
        return ids, {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
    ids[:, SPOTS[0] - 1] = VISION_START
    patches = 4 * len(SPOTS)
    image: dict[str, Any] = {
        "pixel_values": torch.randn(rows * patches, 3 * 2 * 8 * 8, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
    }
    return ids, image


def kinds_of_tokens(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """What newer versions of transformers want to be told of each token of an image."""
    if "mm_token_type_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"mm_token_type_ids": (ids == IMAGE).int()}
