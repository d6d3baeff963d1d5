"""Where a user of open_clip gets a model: `create_model`, which its other factories call."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch

HERE = Path(__file__).parent
# What is compared with reference data: open_clip's own towers, one of timm's, custom text towers.
MODELS = ("ViT-B-32", "ViT-S-32-alt", "vit_relpos_medium_patch16_cls_224", "PE-Core-T-16-384")


def install(patch: Callable[[Any], None]) -> None:
    _write_reference_data()
    create = open_clip.factory.create_model

    @functools.wraps(create)
    def create_model(*args: Any, **kwargs: Any) -> Any:
        model = create(*args, **kwargs)
        if not isinstance(model, torch.jit.ScriptModule):
            patch(model)
        return model

    open_clip.factory.create_model = open_clip.create_model = create_model


def role_of(model: Any) -> str:
    return "cls"


def _write_reference_data() -> None:
    """By open_clip's own program, from the unpatched models."""
    models = HERE / "models.txt"
    models.write_text("\n".join(MODELS))
    os.environ["OPEN_CLIP_TEST_REG_MODELS"] = str(models)
    sys.path.insert(0, str(HERE))
    import util_test

    util_test.create_test_data(MODELS)
