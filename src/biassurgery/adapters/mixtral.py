"""Mixtral: mixture of experts."""

from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.transformers import TransformersDecoder


@register_adapter
class Mixtral(TransformersDecoder):
    family = "mixtral"
    model_types = ("mixtral",)
    path = "layers"
