"""SigLIP 2 of transformers (NaFlex): images arrive as packed patches, with the shape of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.any_vision import AnyVision
from biassurgery.adapters.arguments import parameters_of
from biassurgery.adapters.image_tower import PIXELS, stacks_in
from biassurgery.adapters.interface import model_type
from biassurgery.adapters.libraries import is_transformers
from biassurgery.adapters.registry import register_adapter
from biassurgery.errors import BadBatch

SHAPES = "spatial_shapes"
MASK = "pixel_attention_mask"


@register_adapter
class Siglip2Vision(AnyVision):
    """Its image tower: patches (B, N, patch x patch x C), or images that are cut into them here.

    The images of a batch must have one shape: then none of its rows ends in padding, or all of them
    in as much, which is left out.
    """

    family = "siglip2_vision"
    pixel_axes = (3, 4)

    def matches(self, model: nn.Module) -> bool:
        return is_transformers(model) and any(
            model_type(stack.tower).startswith("siglip2") for stack in stacks_in(model)
        )

    def inputs(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        config: Any = model.config
        packed = pack(batch, getattr(config, "vision_config", config).patch_size)
        if MASK not in parameters_of(model):  # the module inside its model, in transformers 4
            packed["attention_mask"] = packed.pop(MASK)
        return super().inputs(model, packed)

    def grids(self, batch: Mapping[str, Any], patch: tuple[int, int]) -> list[tuple[int, int]]:
        rows, columns = pack(batch, patch[0])[SHAPES][0].tolist()
        return [(rows, columns)]


def pack(batch: Mapping[str, Any], side: int) -> dict[str, Any]:
    """A batch with the patches of images of one shape, and no padding.

    Raises:
        BadBatch: shapes differ, or packed patches come without them.
    """
    pixels: Tensor = batch[PIXELS]
    others = {name: value for name, value in batch.items() if name not in (PIXELS, SHAPES, MASK)}
    if pixels.dim() == 4:
        rows, columns = pixels.shape[-2] // side, pixels.shape[-1] // side
        cut = pixels[..., : rows * side, : columns * side]
        grid = cut.unflatten(-2, (rows, side)).unflatten(-1, (columns, side))
        patches = grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        shapes = torch.tensor([[rows, columns]], device=pixels.device).expand(len(pixels), -1)
    else:
        shapes = batch.get(SHAPES)
        if not isinstance(shapes, Tensor) or (shapes != shapes[:1]).any():
            said = "none" if shapes is None else shapes.tolist()
            raise BadBatch(
                f"batches: pixel_values are packed patches, and {SHAPES} {said}; give {SHAPES} (B,"
                " 2) of images of one shape a batch, as the processor makes them of such images."
            )
        patches = pixels[:, : int(shapes[0].prod())]
    mask = torch.ones(patches.shape[:2], dtype=torch.int32, device=pixels.device)
    return {**others, PIXELS: patches, SHAPES: shapes, MASK: mask}
