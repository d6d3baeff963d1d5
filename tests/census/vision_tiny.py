"""A tiny random model of any type of the installed transformers that reads images, by shrinking the
sizes in its default config.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto as auto

from tests.census.tiny import MAJOR, VOCAB, shrink
from tests.census.tiny import OVERRIDES as TEXT

# In this order: the first of these mappings that has a type says the class of its model.
MAPPINGS = (
    "IMAGE",
    "IMAGE_CLASSIFICATION",
    "BACKBONE",
    "DEPTH_ESTIMATION",
    "MASKED_IMAGE_MODELING",
    "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "INSTANCE_SEGMENTATION",
    "OBJECT_DETECTION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "ZERO_SHOT_OBJECT_DETECTION",
    "IMAGE_MATTING",
    "IMAGE_TO_IMAGE",
    "KEYPOINT_DETECTION",
    "KEYPOINT_MATCHING",
    "CAUSAL_IMAGE_MODELING",
    "IMAGE_TEXT_TO_TEXT",
    "VISION_2_SEQ",
)
_KOSMOS = {"layers": 2, "embed_dim": 32, "ffn_dim": 64, "attention_heads": 4, "vocab_size": 64}
_DETECTORS = ("conditional_detr", "dab-detr", "deformable_detr", "detr", "table-transformer")
_PAIRS = {"image_size": [64, 64], "patch_size": [8, 8]}
OVERRIDES: dict[str, dict[str, Any]] = {
    **TEXT,
    **dict.fromkeys(_DETECTORS, {"use_pretrained_backbone": False} if MAJOR < 5 else {}),
    "internvl": {"vision_config": _PAIRS},
    "kosmos-2": {"text_config": _KOSMOS},
    "kosmos-2.5": {"text_config": _KOSMOS},
    "qianfan_ocr": {"vision_config": _PAIRS},
    "qwen2_vl": {"vision_config": {"embed_dim": 32, "hidden_size": 32}},
    "yolos": {"image_size": [48, 64], "num_detection_tokens": 5},
}


def classes() -> dict[str, Any]:
    """The name of the class, or several, of every type."""
    found: dict[str, Any] = {}
    for name in MAPPINGS:
        for model_type, kind in getattr(auto, f"MODEL_FOR_{name}_MAPPING_NAMES", {}).items():
            found.setdefault(model_type, kind)
    del found["vit_mae"]  # draws its patches at random; tests/contract has it
    return found


def tiny_model(model_type: str) -> Any:
    """A random model of the type in evaluation mode."""
    torch.manual_seed(0)
    name = classes()[model_type]
    kind: Any = getattr(transformers, name if isinstance(name, str) else name[0])
    config = shrink(kind.config_class, OVERRIDES.get(model_type, {}), dicts=MAJOR < 5)
    return kind._from_config(config).eval()


def images_for(tower: Any, rows: int) -> tuple[dict[str, Any], Any]:
    """What a tower is called with, and what the library is given: images of the size that its
    config says; packed where it reads packed patches.
    """
    config = vision_config(tower)
    size = getattr(config, "image_size", None) or VOCAB
    size = (size, size) if isinstance(size, int) else tuple(size)
    generator = torch.Generator().manual_seed(1)
    channels = getattr(config, "num_channels", 3)
    images = torch.randn(rows, channels, *size, generator=generator)
    names = inspect.signature(tower.forward).parameters
    if "spatial_shapes" not in names:
        return {"pixel_values": images}, images
    packed = {
        "pixel_values": torch.randn(rows, 12, channels * config.patch_size**2, generator=generator),
        "spatial_shapes": torch.tensor([[3, 4]] * rows),
    }
    mask = "pixel_attention_mask" if "pixel_attention_mask" in names else "attention_mask"
    return {**packed, mask: torch.ones(rows, 12, dtype=torch.int32)}, packed


def vision_config(tower: Any) -> Any:
    """The config of a tower, also where it has that of a whole model."""
    return getattr(tower.config, "vision_config", tower.config)
