"""The mask that a model hands to its attention, in the form that the core takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from biassurgery.errors import UnsupportedModel
from biassurgery.ops.masks import lower_right


def as_mask(
    mask: Any,
    implementation: str,
    queries: int,
    keys: int,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> tuple[Tensor | None, bool]:
    """A mask broadcastable to (B, H, T, S), or None, and whether the attention is causal besides.

    Args:
        mask: None; (B, S), 1 for real tokens, as flash attention takes it; (B, 1 or H, T, S or
            more), bool (True: may attend) or added to the logits, as sdpa and eager attention take
            it; or the BlockMask of flex attention.
        implementation: what it was built for; decides what None means.
        causal: whether the attention is causal where no mask says more.
        window: of a sliding attention.
    """
    if mask is not None and not isinstance(mask, Tensor):
        return _of_blocks(mask, queries, keys, device), False
    if mask is not None and mask.dim() == 4:
        return mask[..., :keys], False
    if mask is not None and mask.dim() != 2:
        raise UnsupportedModel(
            f"attention_mask: {tuple(mask.shape)}; an attention takes (B, S) or (B, H, T, S)."
        )
    if implementation == "eager":
        if mask is not None:
            raise UnsupportedModel(
                f"attention_mask: {tuple(mask.shape)} reached eager attention, which takes (B, H,"
                " T, S)."
            )
        return None, False  # eager attention without a mask sees everything
    # Only a flash kernel leaves the causal order and the window to the attention itself when there
    # are more keys than they let through.
    sliding = window is not None and keys > window and implementation != "sdpa"
    if mask is None and not sliding:
        return None, causal and queries > 1
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if causal:
        seen = lower_right(queries, keys, device)
    if window is not None and sliding:
        seen = seen.triu(keys - queries - window + 1)
    seen = seen[None, None]
    return (seen if mask is None else seen & mask[:, None, None, -keys:].bool()), False


def _of_blocks(mask: Any, queries: int, keys: int, device: torch.device) -> Tensor:
    from torch.nn.attention.flex_attention import BlockMask, create_mask

    if not isinstance(mask, BlockMask):
        raise UnsupportedModel(
            f"attention_mask: {type(mask).__name__} is not a tensor or a BlockMask."
        )
    rows, heads = mask.shape[:2]
    return create_mask(mask.mask_mod, rows, heads, queries, keys, device=str(device))
