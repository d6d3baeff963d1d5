"""Attention with explicit biases and its log-sum-exp, in the fastest exact way there is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from biassurgery.errors import BadOption
from biassurgery.ops.columns import Columns
from biassurgery.ops.dense import dense
from biassurgery.ops.fused import fused
from biassurgery.ops.masks import check_mask


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    columns: Columns | None = None,
    weights: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax([scale * q k^T + mask, columns]) [v; columns.value], and its log-sum-exp.

    q (B, H, T, d), k (B, Hkv, S, d), v (B, Hkv, S, dv): query head h reads key and value head h //
    (H / Hkv).
    mask: bool (True: may attend) or float (added to the logits), broadcastable to (B, H, T, S).
    causal: the last query sees the last key: query t sees the keys up to S - T + t. With a mask,
        both apply.
    scale: 1 / sqrt(d) where it is None. dropout: probability with which a share of attention is
        dropped.
    softcap: key logits become softcap * tanh(logit / softcap) before the mask; those of the columns
        do not.
    weights: where the shares (B, H, T, S) of the keys are left, dropout included, as a part of
        out's graph; None: they are not wanted, and no T x S matrix need exist.

    Returns out (B, H, T, dv) in q's dtype and lse (B, H, T) float32 (float64 for float64), natural
    logarithm, without gradient. A query that may attend to nothing has out 0 and lse -inf. Raises
    `BadOption` where shapes do not fit.
    """
    _check(q, k, v, mask, dropout)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    device = q.device.type
    if not torch.is_autocast_enabled(device):
        return _attend(q, k, v, mask, causal, scale, dropout, softcap, columns, weights)
    # As torch's own attention does it: the inputs are cast once, and no operation inside again.
    dtype = torch.get_autocast_dtype(device)
    q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    with torch.autocast(device, enabled=False):
        return _attend(q, k, v, mask, causal, scale, dropout, softcap, columns, weights)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    softcap: float | None,
    columns: Columns | None,
    weights: list[Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """By a fused kernel where one takes these tensors, else written out."""
    # No kernel of torch gives a gradient of the mask.
    fixed_mask = mask is None or not mask.requires_grad
    if weights is None and not dropout and softcap is None and fixed_mask:
        result = fused(q, k, v, mask=mask, causal=causal, scale=scale, columns=columns)
        if result is not None:
            return result
    return dense(
        q,
        k,
        v,
        mask=mask,
        causal=causal,
        scale=scale,
        dropout=dropout,
        softcap=softcap,
        columns=columns,
        weights=weights,
    )


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> None:
    if not q.ndim == k.ndim == v.ndim == 4:
        name, x = next((name, x) for name, x in (("q", q), ("k", k), ("v", v)) if x.ndim != 4)
        raise BadOption(f"{name}: {x.ndim} dimensions; give (batch, heads, length, head size).")
    rows, heads, queries, size = q.shape
    key_rows, key_heads, keys, key_size = k.shape
    if key_rows != rows or key_size != size:
        raise BadOption(
            f"k: shape {tuple(k.shape)} beside q {tuple(q.shape)}; give the same batch and head"
            " size."
        )
    if v.shape[:3] != k.shape[:3]:
        raise BadOption(
            f"v: shape {tuple(v.shape)} beside k {tuple(k.shape)}; give the same batch, heads and"
            " length."
        )
    if not key_heads or heads % key_heads:
        raise BadOption(
            f"k: {key_heads} heads for {heads} query heads; give a number of heads that"
            f" divides {heads}."
        )
    if not 0 <= dropout < 1:
        raise BadOption(f"dropout: {dropout}; give a probability from 0 to below 1.")
    if mask is not None:
        check_mask(mask, (rows, heads, queries, keys))
