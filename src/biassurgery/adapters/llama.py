"""LLaMA 1 to 3."""

from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.transformers import TransformersDecoder


@register_adapter
class Llama(TransformersDecoder):
    family = "llama"
    model_types = ("llama",)
    path = "layers"
