"""Phi-1, 1.5 and 2: parallel blocks, partial rotary."""

from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.transformers import TransformersDecoder


@register_adapter
class Phi(TransformersDecoder):
    family = "phi"
    model_types = ("phi",)
    path = "layers"
