"""The host models that this library knows: one short file a family. The most general is registered
first, so it is asked last.
"""

from biassurgery.adapters import transformers  # isort: skip
from biassurgery.adapters import (
    clip,
    dinov2,
    dinov3,
    falcon,
    gpt2,
    gpt_neox,
    hub_dinov2,
    llama,
    mistral,
    mixtral,
    mpt,
    open_clip,
    opt,
    phi,
    siglip,
    timm,
    vit,
    vit_mae,
)

__all__ = [
    "clip",
    "dinov2",
    "dinov3",
    "falcon",
    "gpt2",
    "gpt_neox",
    "hub_dinov2",
    "llama",
    "mistral",
    "mixtral",
    "mpt",
    "open_clip",
    "opt",
    "phi",
    "siglip",
    "timm",
    "transformers",
    "vit",
    "vit_mae",
]
