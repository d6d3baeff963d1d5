"""What to do where numbers of a model are not finite."""

from __future__ import annotations

import torch

from biassurgery.adapters.layers import block_dtype
from biassurgery.adapters.registry import Host


def what_to_do(host: Host) -> str:
    """The next step, as the end of a sentence: in float16 it is the dtype, else the model itself.

    float16 ends at 65,504, which massive activations pass.
    """
    if _computes_in_float16(host):
        return (
            "float16 ends at 65,504, which massive activations pass: measure the model in float32"
            " or bfloat16 (model.float()), and use what is found there on this one"
        )
    return "look at its inputs, weights and patches"


def _computes_in_float16(host: Host) -> bool:
    kind = next(host.blocks[0].parameters()).device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind) == torch.float16
    return any(block_dtype(block) == torch.float16 for block in host.blocks)
