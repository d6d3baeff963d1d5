"""Mistral: sliding window, grouped queries."""

from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.transformers import TransformersDecoder


@register_adapter
class Mistral(TransformersDecoder):
    family = "mistral"
    model_types = ("mistral",)
    path = "layers"
