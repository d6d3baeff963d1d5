"""MPT: ALiBi."""

from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.transformers import TransformersDecoder


@register_adapter
class Mpt(TransformersDecoder):
    family = "mpt"
    model_types = ("mpt",)
    path = "blocks"
