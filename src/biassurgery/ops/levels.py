"""Which values of a channel are massive, and which calibrated level each of them belongs to."""

from __future__ import annotations

import torch
from torch import Tensor


def is_massive(x: Tensor, gates: Tensor) -> Tensor:
    """Values beyond their channel's gate: x (..., C) float32, gates (C,) float32 -> (..., C) bool."""
    return x.abs() > gates


def nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """Index of the level nearest to each value: x (..., C), levels (C, L), absent ones NaN -> (..., C) int64."""
    distance = (x.unsqueeze(-1) - levels).abs()
    return distance.nan_to_num(nan=torch.inf, posinf=torch.inf).argmin(-1)


def take_level(index: Tensor, values: Tensor) -> Tensor:
    """The value that stands at each index: index (..., C) in [0, L), values (C, L) -> (..., C)."""
    return values.expand(*index.shape, -1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
