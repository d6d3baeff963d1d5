"""Explicit attention biases as extra columns of the softmax.

Their logits, and how they join an attention that is computed already.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from biassurgery.errors import BadOption
from biassurgery.ops.heads import cast, repeat_heads, softmax_dtype
from biassurgery.ops.masks import broadcasts


class Columns(NamedTuple):
    """N extra columns of the softmax: softmax([q K^T, s]) [V; value].

    A column's logit is s = scale * q . key + logit, or logit alone where there is no key. Keys are
    neither rotated nor masked. Source: Sun et al. 2024, eq. 3, and its kin.
    """

    logit: Tensor
    """Broadcastable to (B, H, T, N)."""
    key: Tensor | None = None
    """(H or Hkv, N, d)."""
    value: Tensor | None = None
    """(H or Hkv, N, dv); None: zeros."""


def check_columns(columns: Columns, q: Tensor, v: Tensor) -> int:
    """How many columns they are.

    Raises `BadOption` where they do not fit queries q (B, H, T, d) and values v (B, Hkv, S, dv).
    """
    logit, key, value = columns
    count = _count(columns)
    rows, heads, queries, _ = q.shape
    for name, x, like in (("key", key, q), ("value", value, v)):
        if x is not None and not _fits(x, (heads, v.shape[1]), count, like.shape[3]):
            expected = f"({heads} or {v.shape[1]} heads, {count} columns, {like.shape[3]})"
            raise BadOption(f"columns.{name}: shape {tuple(x.shape)}; give {expected}.")
    full = (rows, heads, queries, count)
    if not broadcasts(logit.shape, full):
        raise BadOption(
            f"columns.logit: shape {tuple(logit.shape)}; give one that broadcasts to {full}."
        )
    return count


def _count(columns: Columns) -> int:
    """How many columns they say that they are: the key's number, else the value's or logit's."""
    for x in (columns.key, columns.value):
        if x is not None and x.ndim == 3:
            return x.shape[1]
    return columns.logit.shape[-1] if columns.logit.ndim else 1


def _fits(x: Tensor, heads: tuple[int, int], count: int, size: int) -> bool:
    shape = x.shape
    return len(shape) == 3 and shape[0] in heads and shape[1] == count and shape[2] == size


def expand_columns(columns: Columns, q: Tensor, v: Tensor) -> Columns:
    """The same columns in the softmax's precision, expanded.

    logit (B, H, T, N), key (H, N, d), value (H, N, dv).

    Raises `BadOption` where they do not fit queries q (B, H, T, d) and values v (B, Hkv, S, dv).
    """
    count = check_columns(columns, q, v)
    heads = q.shape[1]
    dtype = softmax_dtype(q)
    logit, *parts = columns
    key, value = (None if x is None else cast(repeat_heads(x, heads), dtype) for x in parts)
    return Columns(cast(logit, dtype).expand(*q.shape[:3], count), key, value)


def column_logits(q: Tensor, columns: Columns, scale: float) -> Tensor:
    """Logits of the columns: q (B, H, T, d) -> (B, H, T, N), float32 or, for float64, float64."""
    logit, key, _ = columns
    dtype = softmax_dtype(q)
    if key is None:
        return cast(logit, dtype).expand(*q.shape[:3], _count(columns))
    if q.shape[2] == key.shape[1] == 1:
        # A step of decoding costs what its operators cost to start: nothing is repeated, and there
        # is no product of matrices, so that torch.compile can make one operator of all.
        products = _by_head(q, key) * cast(key, dtype)
        product = products.sum(-1).view(*q.shape[:3], 1)
    else:
        product = cast(q, dtype) @ cast(repeat_heads(key, q.shape[1]), dtype).mT
    return torch.add(cast(logit, dtype), product, alpha=scale)


def finite(lse: Tensor) -> Tensor:
    """A log-sum-exp to subtract from logits: 0 instead of -inf where nothing may be attended.

    So exp(-inf - lse) is 0, not NaN.
    """
    return lse.masked_fill(lse == -torch.inf, 0)


def join_columns_(out: Tensor, lse: Tensor, logits: Tensor, value: Tensor | None) -> Tensor:
    """Adds columns to a finished attention; returns the new lse (B, H, T).

    out (B, H, T, dv) is changed in place; lse (B, H, T), logits (B, H, T, N), value (H or Hkv, N,
    dv) in any dtype.

    All columns are one, with their own log-sum-exp and mean value; out' = lerp(out, value,
    sigmoid(s - lse)).
    """
    alone = logits.shape[-1] == 1
    total = logits if alone else logits.logsumexp(-1, keepdim=True)
    lse = lse.unsqueeze(-1)
    # The lowest number stands for -inf, so that a column that is off leaves alone what sees
    # nothing: -inf + inf would be NaN.
    lead = total - lse.clamp(min=torch.finfo(lse.dtype).min)
    if value is None:
        out.mul_(cast((-lead).sigmoid_(), out.dtype))
    else:
        share = cast(lead.sigmoid_(), out.dtype)
        if alone and out.shape[2] == 1:
            out = _by_head(out, value)
            share = _by_head(share, value)
        else:
            value = repeat_heads(value, out.shape[1])
        if not alone:
            value = (logits - finite(total)).exp() @ cast(value, logits.dtype)
        out.lerp_(cast(value, out.dtype), share)
    return torch.logaddexp(lse, total).squeeze(-1)


def _by_head(x: Tensor, like: Tensor) -> Tensor:
    """Of one query, the heads beside that of `like` (n, 1, d) which they share: a view.

    x (B, H, 1, d) -> (B, n, H / n, d).
    """
    rows, heads, _, size = x.shape
    shared = like.shape[0]
    return x.view(rows, shared, heads // shared, size)
