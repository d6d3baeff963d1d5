"""CLIP and SigLIP of transformers: their towers, and models that are one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from biassurgery.adapters.arguments import call
from biassurgery.adapters.interface import attention_of, model_type
from biassurgery.adapters.libraries import is_transformers
from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.stacks import first_of
from biassurgery.adapters.transformers_text import TransformersText
from biassurgery.adapters.transformers_vision import TransformersVision
from biassurgery.surgery.attention import Attention


class VisionTower(TransformersVision):
    """The image tower of a model with two, and models that are one."""

    whole: ClassVar[str]  # the `config.model_type` of a model that may have both towers
    stacks = ("encoder.layers", "vision_model.encoder.layers")

    def matches(self, model: nn.Module) -> bool:
        return super().matches(model) or (
            is_transformers(model)
            and model_type(model) == self.whole
            and hasattr(model, "vision_model")
        )

    def part(self, model: nn.Module) -> nn.Module:
        whole: Any = model
        return whole.vision_model if hasattr(model, "text_model") else model

    def architecture(self, model: nn.Module) -> str:
        return self.model_types[0]


class TextTower(TransformersText):
    """The text tower of a model with two, and models that are one: no cache, no language head.

    Attributes:
        forwards_only: whether it is causal; SigLIP's attends in both directions.
    """

    whole: ClassVar[str]
    forwards_only: ClassVar[bool]

    def matches(self, model: nn.Module) -> bool:
        return super().matches(model) or (
            is_transformers(model)
            and model_type(model) == self.whole
            and hasattr(model, "text_model")
        )

    def part(self, model: nn.Module) -> nn.Module:
        whole: Any = model
        return whole.text_model if hasattr(model, "vision_model") else model

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        paths = ("encoder.layers", "text_model.encoder.layers")
        return list(first_of(model, paths, "a list of blocks").children())

    def width(self, model: nn.Module) -> int:
        return model.config.hidden_size  # type: ignore[union-attr, return-value]

    def architecture(self, model: nn.Module) -> str:
        return self.model_types[0]

    def attention(self, model: nn.Module, block: nn.Module) -> Attention:
        return attention_of(model, block, model.config)

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        call(model, self.inputs(model, batch))

    def causal(self, model: nn.Module) -> bool:
        return self.forwards_only

    def context(self, model: nn.Module) -> int | None:
        return model.config.max_position_embeddings  # type: ignore[union-attr, return-value]

    def learned_positions(self, model: nn.Module) -> bool:
        return True


# The model type of the whole, those of the towers, whether images have [CLS], whether text is
# causal.
TOWERS = (
    ("clip", "clip_vision_model", "clip_text_model", True, True),
    ("siglip", "siglip_vision_model", "siglip_text_model", False, False),
)

for whole, image_type, text_type, cls, causal in TOWERS:
    images = {"family": f"{whole}_vision", "model_types": (image_type,), "cls": cls}
    texts = {"family": f"{whole}_text", "model_types": (text_type,), "forwards_only": causal}
    for base, row in ((VisionTower, images), (TextTower, texts)):
        attributes = {"__module__": __name__, "whole": whole, **row}
        register_adapter(type(row["family"], (base,), attributes))
