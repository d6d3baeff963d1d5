"""A tiny random model of any type of the installed transformers that reads images, by shrinking the
sizes in its default config.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto as auto

from tests.census.tiny import shrink

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
OVERRIDES: dict[str, dict[str, Any]] = {}


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
    config = shrink(transformers.CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}))
    return kind._from_config(config).eval()
