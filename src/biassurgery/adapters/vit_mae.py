"""MAE of transformers: the encoder. A model that has the decoder, too, is measured without it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.transformers_vision import TransformersVision


@register_adapter
class VitMae(TransformersVision):
    family = "vit_mae"
    model_types = ("vit_mae",)
    stacks = ("layers", "encoder.layer", "vit.layers", "vit.encoder.layer")

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """All patches, in order, where a batch has no `noise` of its own.

        MAE otherwise drops three quarters of them at random.
        """
        encoder: Any = getattr(model, "vit", model)
        if "noise" in batch:
            super().run(encoder, batch)
            return
        embeddings = encoder.embeddings
        pixels = batch["pixel_values"]
        size = embeddings.patch_embeddings.patch_size
        patches = (pixels.shape[-2] // size[0]) * (pixels.shape[-1] // size[1])
        config = embeddings.config
        embeddings.config = copy.copy(embeddings.config)
        try:
            embeddings.config.mask_ratio = 0.0
            order = torch.arange(patches, device=pixels.device, dtype=torch.float32)
            super().run(encoder, {**batch, "noise": order.expand(len(pixels), -1)})
        finally:
            embeddings.config = config
