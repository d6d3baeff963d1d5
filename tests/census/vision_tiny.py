"""A tiny random model of any type of the installed transformers that reads images, by shrinking the
sizes in its default config.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto as auto

from tests.census.tiny import MAJOR, shrink

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
OVERRIDES: dict[str, dict[str, Any]] = {
    "yolos": {"image_size": [48, 64], "num_detection_tokens": 5},
}


def classes() -> dict[str, Any]:
    """The name of the class, or several, of every type."""
    found: dict[str, Any] = {}
    for name in MAPPINGS:
        for model_type, kind in getattr(auto, f"MODEL_FOR_{name}_MAPPING_NAMES", {}).items():
            found.setdefault(model_type, kind)
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
    config = tower.config
    size = getattr(config, "image_size", None) or 64
    size = (size, size) if isinstance(size, int) else tuple(size)
    generator = torch.Generator().manual_seed(1)
    channels = getattr(config, "num_channels", 3)
    images = torch.randn(rows, channels, *size, generator=generator)
    names = inspect.signature(tower.forward).parameters
    if "spatial_shapes" not in names:
        return {"pixel_values": images}, images
    patches = torch.randn(
        rows, 12, channels * config.patch_size**2, generator=generator
    )  # 3 x 4
    mask = "pixel_attention_mask" if "pixel_attention_mask" in names else "attention_mask"
    arguments = {
        "pixel_values": patches,
        mask: torch.ones(rows, 12, dtype=torch.int32),
        "spatial_shapes": torch.tensor([[3, 4]] * rows),
    }
    return arguments, {name.replace("pixel_attention_mask", "pixel_attention_mask"): value for name, value in arguments.items()}
