"""The encoders of T5 and UMT5 by themselves: the text encoders of diffusion pipelines."""

from __future__ import annotations

from torch import nn

from biassurgery.adapters.halves import t5_attention
from biassurgery.adapters.interface import model_type
from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.transformers_text import TransformersText
from biassurgery.surgery.attention import Attention


@register_adapter
class T5Encoder(TransformersText):
    """One stack that reads one text in both directions; no head, no cache, no generation."""

    family = "t5_encoder"
    model_types = ("t5", "umt5")

    def matches(self, model: nn.Module) -> bool:
        # Not the model with a decoder, in which two stacks read different texts.
        return super().matches(model) and hasattr(model, "encoder") and not self._decodes(model)

    def _decodes(self, model: nn.Module) -> bool:
        return hasattr(model, "decoder") or hasattr(model, "transformer")

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule("encoder.block").children())

    def width(self, model: nn.Module) -> int:
        return model.config.d_model  # type: ignore[union-attr, return-value]

    def architecture(self, model: nn.Module) -> str:
        return f"{model_type(model)}_encoder"

    def causal(self, model: nn.Module) -> bool:
        return False

    def attention(self, model: nn.Module, block: nn.Module) -> Attention:
        return t5_attention(model, block)
