"""Explicit attention biases as extra columns of the softmax.

Their logits, and how they join an attention that is computed already.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from biassurgery.errors import BadOption
from biassurgery.ops.heads import repeat_heads, softmax_dtype


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
    known = next((x for x in (key, value) if x is not None and x.ndim == 3), None)
    count = known.shape[1] if known is not None else logit.shape[-1] if logit.ndim else 1
    heads = (q.shape[1], v.shape[1])
    for name, x, size in (("key", key, q.shape[3]), ("value", value, v.shape[3])):
        if x is not None and (
            x.ndim != 3 or x.shape[0] not in heads or x.shape[1] != count or x.shape[2] != size
        ):
            expected = f"({heads[0]} or {heads[1]} heads, {count} columns, {size})"
            raise BadOption(f"columns.{name}: shape {tuple(x.shape)}; give {expected}.")
    full = (*q.shape[:3], count)
    if logit.ndim > 4 or any(
        size not in (1, wanted) for size, wanted in zip(reversed(logit.shape), reversed(full))
    ):
        raise BadOption(
            f"columns.logit: shape {tuple(logit.shape)}; give one that broadcasts to {full}."
        )
    return count


def expand_columns(columns: Columns, q: Tensor, v: Tensor) -> Columns:
    """The same columns in the softmax's precision, expanded.

    logit (B, H, T, N), key (H, N, d), value (H, N, dv).

    Raises `BadOption` where they do not fit queries q (B, H, T, d) and values v (B, Hkv, S, dv).
    """
    count = check_columns(columns, q, v)
    heads = q.shape[1]
    dtype = softmax_dtype(q)
    logit, *parts = columns
    key, value = (None if x is None else repeat_heads(x, heads).to(dtype) for x in parts)
    return Columns(logit.to(dtype).expand(*q.shape[:3], count), key, value)


def column_logits(q: Tensor, columns: Columns, scale: float) -> Tensor:
    """Logits of the columns: q (B, H, T, d) -> (B, H, T, N), float32 or, for float64, float64."""
    logit, key, _ = columns
    dtype = softmax_dtype(q)
    if key is None:
        return logit.to(dtype).expand(*q.shape[:3], -1)
    if q.shape[2] == key.shape[1] == 1:
        # A step of decoding costs what its operators cost to start: nothing is repeated, and there
        # is no product of matrices, so that torch.compile can make one operator of all.
        products = _beside(q, key) * key.to(dtype)[:, None]
        product = products.sum(-1, dtype=dtype).view(*q.shape[:3], 1)
    else:
        product = q.to(dtype) @ repeat_heads(key, q.shape[1]).to(dtype).mT
    return torch.add(logit.to(dtype), product, alpha=scale)


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
        out.mul_((-lead).sigmoid_().to(out.dtype))
    else:
        share = lead.sigmoid_().to(out.dtype)
        if alone:
            _beside(out, value).lerp_(value.to(out.dtype)[:, None], _beside(share, value))
        else:
            value = repeat_heads(value, out.shape[1]).to(logits.dtype)
            out.lerp_(((logits - finite(total)).exp() @ value).to(out.dtype), share)
    return torch.logaddexp(lse, total).squeeze(-1)


def _beside(x: Tensor, like: Tensor) -> Tensor:
    """The query heads beside the heads of `like` (n, N, d) that they share: a view.

    x (B, H, T, d) -> (B, n, H / n, T, d).
    """
    rows, heads, length, size = x.shape
    return x.view(rows, len(like), heads // len(like), length, size)
