"""DINOv2 of transformers, with and without registers."""

from __future__ import annotations

from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.transformers_vision import TransformersVision


@register_adapter
class Dinov2(TransformersVision):
    family = "dinov2"
    model_types = ("dinov2",)
    stacks = ("encoder.layer", "dinov2.encoder.layer")
    mlp_outs = ("mlp.fc2", "mlp.weights_out", "mlp.down_proj")


@register_adapter
class Dinov2WithRegisters(TransformersVision):
    family = "dinov2_with_registers"
    model_types = ("dinov2_with_registers",)
    stacks = ("encoder.layer", "dinov2_with_registers.encoder.layer")
    mlp_outs = ("mlp.fc2", "mlp.weights_out", "mlp.down_proj")
