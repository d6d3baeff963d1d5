"""Models that read sound: the encoder of Whisper by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.base import Adapter
from biassurgery.adapters.interface import attention_of, model_type
from biassurgery.adapters.libraries import is_transformers
from biassurgery.adapters.registry import register_adapter
from biassurgery.surgery.attention import Attention, Shape


@register_adapter
class WhisperEncoder(Adapter):
    """What `get_encoder()` of a Whisper returns; it shares its modules with the whole.

    It reads log-mel features (B, mels, frames), of which its convolutions make a token out of two
    frames, and it masks none, so that every token is one of the sequence.
    """

    family = "whisper_encoder"
    modality = "audio"
    entry = "blocks"

    def matches(self, model: nn.Module) -> bool:
        return (
            is_transformers(model)
            and model_type(model) == "whisper"
            and {"conv1", "conv2", "layers"} <= set(model._modules)
        )

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule("layers").children())

    def width(self, model: nn.Module) -> int:
        return model.config.d_model  # type: ignore[union-attr, return-value]

    def roles(self, model: nn.Module) -> tuple[str, ...]:
        return ("start", "elsewhere")

    def token_roles(
        self, model: nn.Module, batch: Mapping[str, Any], shape: tuple[int, int]
    ) -> Tensor:
        codes = torch.arange(shape[1], device=batch["input_features"].device)
        return codes.clamp(max=1).expand(shape)

    def attention(self, model: nn.Module, block: nn.Module) -> Attention:
        found = attention_of(model, block, model.config)
        module: Any = found.module  # the config has the heads of both halves
        heads, size = module.num_heads, module.head_dim
        return found._replace(shape=Shape(heads, heads, size, size, self.width(model)))
