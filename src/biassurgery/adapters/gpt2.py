"""GPT-2: learned positions, LayerNorm."""

from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.transformers import TransformersDecoder


@register_adapter
class GPT2(TransformersDecoder):
    family = "gpt2"
    model_types = ("gpt2",)
    path = "h"
    positions = "wpe"
    position_argument = ("input", 0)
