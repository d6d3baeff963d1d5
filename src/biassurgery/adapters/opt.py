"""OPT: learned positions, LayerNorm before or after."""

from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.transformers import TransformersDecoder


@register_adapter
class Opt(TransformersDecoder):
    family = "opt"
    model_types = ("opt",)
    path = "decoder.layers"
    positions = "decoder.embed_positions"
    position_argument = ("position_ids", 2)
