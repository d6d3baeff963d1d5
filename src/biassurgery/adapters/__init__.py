"""The host models that this library knows: tables, and a short file for each of the others.

A table holds the models of which names say all. The most general is registered first, so it is
asked last.
"""

from biassurgery.adapters import fallback  # isort: skip
from biassurgery.adapters import any_vision  # isort: skip
from biassurgery.adapters import (
    decoders,
    falcon,
    halves,
    hub_dinov2,
    mpt,
    open_clip,
    siglip2,
    sound,
    t5,
    timm,
    towers,
    vision,
    vit_mae,
)

__all__ = [
    "any_vision",
    "decoders",
    "falcon",
    "fallback",
    "halves",
    "hub_dinov2",
    "mpt",
    "open_clip",
    "siglip2",
    "sound",
    "t5",
    "timm",
    "towers",
    "vision",
    "vit_mae",
]
