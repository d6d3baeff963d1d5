"""Falcon: parallel blocks, rotary or ALiBi."""

from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.transformers import TransformersDecoder


@register_adapter
class Falcon(TransformersDecoder):
    family = "falcon"
    model_types = ("falcon",)
    path = "h"
