"""GPT-NeoX and Pythia: parallel blocks, partial rotary."""

from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.transformers import TransformersDecoder


@register_adapter
class GPTNeoX(TransformersDecoder):
    family = "gpt_neox"
    model_types = ("gpt_neox",)
    path = "layers"
