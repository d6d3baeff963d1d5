"""Where a user of timm gets a model: `timm.create_model`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import timm
from timm.models._features import FeatureGetterNet

# The classes that this library serves; the tests make models of others beside them.
SERVED = (
    "VisionTransformer",
    "VisionTransformerRelPos",
    "NaFlexVit",
    "Beit",
    "Eva",
    "DeepseekVitClassifier",
    "DeepseekVitEncoder",
    "Gemma4VitClassifier",
    "Gemma4VitEncoder",
    "Qwen3VitClassifier",
    "Qwen3VitEncoder",
)


def install(patch: Callable[[Any], None]) -> None:
    create = timm.create_model

    @functools.wraps(create)
    def create_model(*args: Any, **kwargs: Any) -> Any:
        model = create(*args, **kwargs)
        # features_only=True wraps the model, which stays the one to patch.
        part = model.model if isinstance(model, FeatureGetterNet) else model
        if any(cls.__name__ in SERVED for cls in type(part).__mro__):
            patch(part)
        return model

    timm.create_model = timm.models.create_model = create_model


def role_of(model: Any) -> str:
    part = getattr(model, "encoder", model)
    embeddings = getattr(part, "embeds", part)
    return "patch" if getattr(embeddings, "cls_token", None) is None else "cls"
