"""How much of each query's attention goes to a few chosen keys, without the T x S matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from biassurgery.ops.decompose import key_probs
from biassurgery.surgery.call import Call


def keys_at(tensor: Tensor, at: Tensor) -> Tensor:
    """The keys or values of chosen positions, row by row: (B, Hkv, C, d).

    tensor (B, Hkv, S, d), at (B, C).
    """
    return tensor.gather(2, at[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def shares(call: Call, lse: Tensor, at: Tensor) -> Tensor:
    """Share of each query's attention on the keys at chosen positions: (B, H, T, C).

    lse (B, H, T), at (B, C) int64.
    """
    return key_probs(call.q, keys_at(call.k, at), lse, call.scale, _mask_at(call, at), call.softcap)


def _mask_at(call: Call, at: Tensor) -> Tensor | None:
    """The mask of those keys only, (B, 1 or H, 1 or T, C), the causal order in it."""
    queries = call.q.shape[2]
    keys = call.k.shape[2]
    mask = None
    if call.mask is not None:
        mask = call.mask[(None,) * (4 - call.mask.dim())]
        mask = mask.expand(len(at), -1, -1, keys).gather(
            3, at[:, None, None].expand(-1, *mask.shape[1:3], -1)
        )
    if not call.causal:
        return mask
    after = torch.arange(keys - queries, keys, device=at.device)[:, None] < at[:, None, None]
    if mask is None:
        return ~after
    return mask & ~after if mask.dtype == torch.bool else mask.masked_fill(after, -torch.inf)
