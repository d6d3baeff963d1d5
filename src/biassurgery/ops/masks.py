"""Attention masks in the one form that the kernels take: an additive one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from biassurgery.errors import BadOption


def lower_right(queries: int, keys: int, device: torch.device) -> Tensor:
    """Causal, the last query sees the last key: (T, S) bool.

    True where query t may see key s, s <= S - T + t.
    """
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def additive(
    mask: Tensor | None, causal: bool, q: Tensor, k: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Mask and causality as one additive mask in `dtype`; None: all is visible.

    It has four dimensions that broadcast to (B, H, T, S).
    """
    queries = q.shape[2]
    keys = k.shape[2]
    visible = None
    # A single query sees every key: causality says nothing.
    if causal and (queries > 1 or keys == 0):
        visible = lower_right(queries, keys, q.device)
    if mask is not None:
        check_mask(mask, (*q.shape[:3], keys))
        mask = mask.view((1,) * (4 - mask.ndim) + mask.shape)
        if mask.dtype != torch.bool:
            mask = narrowed(mask, dtype)
            return mask if visible is None else mask.masked_fill(~visible, -torch.inf)
        visible = mask if visible is None else mask & visible
    if visible is None:
        return None
    visible = visible.view((1,) * (4 - visible.ndim) + visible.shape)
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)


def narrowed(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A float mask in another dtype, whose lowest numbers stay finite.

    Only -inf hides a key for certain.
    """
    if torch.finfo(mask.dtype).min >= torch.finfo(dtype).min:
        return mask.to(dtype)
    hidden = mask == -torch.inf
    return mask.clamp(min=torch.finfo(dtype).min).to(dtype).masked_fill(hidden, -torch.inf)


def check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    """Refuses what is neither a bool nor a float mask, or does not broadcast to (B, H, T, S)."""
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise BadOption(
            f"mask: dtype {mask.dtype}; give bool (True: may attend) or a float mask that is added"
            " to the logits."
        )
    if not broadcasts(mask.shape, shape):
        raise BadOption(
            f"mask: shape {tuple(mask.shape)}; give one that broadcasts to {tuple(shape)}."
        )


def broadcasts(shape: Sequence[int], full: Sequence[int]) -> bool:
    """Whether a tensor of a shape broadcasts to another shape."""
    return len(shape) <= len(full) and all(
        size in (1, wanted) for size, wanted in zip(reversed(shape), reversed(full))
    )


def blind(mask: Tensor) -> Tensor:
    """Queries that may attend to no key at all: additive mask (..., T, S) -> (..., T) bool."""
    return mask.amax(-1) == -torch.inf
