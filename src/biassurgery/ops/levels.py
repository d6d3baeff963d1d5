"""Which values of a channel are massive, and which calibrated level each of them belongs to."""

from __future__ import annotations

import torch
from torch import Tensor


def is_massive(x: Tensor, gates: Tensor) -> Tensor:
    """Values beyond their channel's gate: x (..., C), gates (C,), float32 -> (..., C) bool."""
    return x.abs() > gates


def nearest_level(x: Tensor, middles: Tensor) -> Tensor:
    """Index of the level nearest to x: x (..., C), middles (C, L - 1) -> (..., C) int64.

    Middles are where one level ends and the next begins, ascending; NaN beside absent levels.
    """
    return (x.unsqueeze(-1) > middles).sum(-1)


def of_nearest_level(x: Tensor, middles: Tensor, values: Tensor) -> Tensor:
    """The value that stands for the level nearest to each x: (..., C) or (C,).

    x (..., C), middles (C, L - 1) as in `nearest_level`, values (C, L).
    """
    chosen, *higher = values.unbind(1)
    for middle, value in zip(middles.unbind(1), higher):
        chosen = torch.where(x > middle, value, chosen)
    return chosen
