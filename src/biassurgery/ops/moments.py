"""Mean and standard deviation from sums, and of two sets together."""

from __future__ import annotations

import torch
from torch import Tensor


def moments(total: Tensor, squares: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, float32, from sums (float64) of `count` values and squares."""
    mean = total / count
    variance = squares / count - mean.square()
    floor = 1e-14 * mean.square()  # what the subtraction leaves of a constant
    return mean.float(), torch.where(variance > floor, variance, 0).sqrt().float()


def merged_moments(
    a: Tensor, b: Tensor, s: Tensor, t: Tensor, m: int, n: int
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, float32, of two sets together.

    The sets have `m` and `n` values, means a, b and standard deviations s, t.
    """
    a, b, s, t = (tensor.double() for tensor in (a, b, s, t))
    mean = (m * a + n * b) / (m + n)
    within = (m * s.square() + n * t.square()) / (m + n)
    between = (m * n) / (m + n) ** 2 * (a - b).square()
    return mean.float(), (within + between).sqrt().float()
