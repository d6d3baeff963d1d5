"""Grouped heads (GQA), and the precision in which a softmax is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from biassurgery.errors import BadOption


def softmax_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.promote_types(x.dtype, torch.float32)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, which takes its time even where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """One entry for each query head: x (..., Hkv, n, d) -> (..., H, n, d).

    Query head h reads entry h // (H / Hkv).
    """
    if x.shape[-3] == heads:
        return x
    if heads % x.shape[-3]:
        raise BadOption(
            f"k: {x.shape[-3]} heads for {heads} query heads; give a number of heads that divides"
            f" {heads}."
        )
    return x.repeat_interleave(heads // x.shape[-3], -3)
