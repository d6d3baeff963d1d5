"""The vision transformers of transformers of which names say all: one row a family."""

from __future__ import annotations

from typing import NamedTuple

from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.transformers_vision import TransformersVision

_DINOV2_MLPS = ("mlp.fc2", "mlp.weights_out", "mlp.down_proj")


class Vision(NamedTuple):
    """One family; its name is the `config.model_type` that it serves.

    Attributes:
        stacks: where the block list may be, by version and wrapper.
        mlp_outs: where the second linear layer of a block's MLP may be.
    """

    family: str
    stacks: tuple[str, ...]
    mlp_outs: tuple[str, ...] = TransformersVision.mlp_outs


VISION = (
    Vision("vit", ("layers", "encoder.layer", "vit.layers", "vit.encoder.layer")),
    Vision("dinov2", ("encoder.layer", "dinov2.encoder.layer"), _DINOV2_MLPS),
    Vision(
        "dinov2_with_registers",
        ("encoder.layer", "dinov2_with_registers.encoder.layer"),
        _DINOV2_MLPS,
    ),
    Vision("dinov3_vit", ("model.layer", "layer"), ("mlp.down_proj",)),
)

for row in VISION:
    attributes = {
        "__module__": __name__,
        "family": row.family,
        "model_types": (row.family,),
        "stacks": row.stacks,
        "mlp_outs": row.mlp_outs,
    }
    register_adapter(type(row.family, (TransformersVision,), attributes))
