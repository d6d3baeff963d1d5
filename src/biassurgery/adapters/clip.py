"""CLIP of transformers: its image tower, its text tower, and models that are one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from biassurgery.adapters.base import TextAdapter
from biassurgery.adapters.interface import attention_of, is_transformers, model_type
from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.stacks import first_of
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
        return model.vision_model if hasattr(model, "text_model") else model  # type: ignore[return-value]

    def architecture(self, model: nn.Module) -> str:
        return self.model_types[0]


class TextTower(TextAdapter):
    """The text tower of a model with two, and models that are one: no cache, no language head."""

    whole: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]

    def matches(self, model: nn.Module) -> bool:
        kinds = (*self.model_types, self.whole)
        return (
            is_transformers(model)
            and model_type(model) in kinds
            and (model_type(model) != self.whole or hasattr(model, "text_model"))
        )

    def part(self, model: nn.Module) -> nn.Module:
        return model.text_model if hasattr(model, "vision_model") else model  # type: ignore[return-value]

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(
            first_of(
                model, ("encoder.layers", "text_model.encoder.layers"), "a list of blocks"
            ).children()
        )

    def width(self, model: nn.Module) -> int:
        return model.config.hidden_size  # type: ignore[union-attr, return-value]

    def architecture(self, model: nn.Module) -> str:
        return self.model_types[0]

    def attention(self, model: nn.Module, block: nn.Module) -> Attention:
        return attention_of(model, block, model.config)

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        model(**{name: value for name, value in batch.items() if name != "labels"})


@register_adapter
class ClipVision(VisionTower):
    family = "clip_vision"
    whole = "clip"
    model_types = ("clip_vision_model",)


@register_adapter
class ClipText(TextTower):
    family = "clip_text"
    whole = "clip"
    model_types = ("clip_text_model",)
