"""Register means by hand."""

from __future__ import annotations

from typing import Any

import torch

import biassurgery as bs
from tests.models import HIDDEN, LAYERS


def means(
    seed: int = 0, registers: int = 4, layers: int = LAYERS, width: int = HIDDEN, **fields: Any
) -> bs.RegisterMeans:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(layers, registers, width, generator=generator)
    std = torch.rand(layers, registers, width, generator=generator)
    return bs.RegisterMeans(
        **{
            "values": values,
            "std": std,
            "cls": values[:, 0] + 1,
            "count": 3,
            "architecture": "hub_dinov2",
            **fields,
        }
    )
