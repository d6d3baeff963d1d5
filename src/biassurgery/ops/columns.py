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


def expand_columns(columns: Columns, q: Tensor, v: Tensor) -> Columns:
    """The same columns in the softmax's precision, expanded.

    logit (B, H, T, N), key (H, N, d), value (H, N, dv).

    Raises `BadOption` where they do not fit queries q (B, H, T, d) and values v (B, Hkv, S, dv).
    """
    heads = q.shape[1]
    dtype = softmax_dtype(q)
    parts = {"key": (columns.key, q.shape[3]), "value": (columns.value, v.shape[3])}
    counts = [x.shape[1] for x, _ in parts.values() if x is not None and x.ndim == 3]
    if not counts and columns.logit.ndim:
        counts = [columns.logit.shape[-1]]
    count = counts[0] if counts else 1
    for name, (x, size) in parts.items():
        if x is not None and (
            x.ndim != 3 or x.shape[0] not in (heads, v.shape[1]) or x.shape[1:] != (count, size)
        ):
            expected = f"({heads} or {v.shape[1]} heads, {count} columns, {size})"
            raise BadOption(f"columns.{name}: shape {tuple(x.shape)}; give {expected}.")
    try:
        logit = columns.logit.to(dtype).expand(*q.shape[:3], count)
    except RuntimeError as error:
        expected = (*q.shape[:3], count)
        raise BadOption(
            f"columns.logit: shape {tuple(columns.logit.shape)}; give one that broadcasts to"
            f" {expected}."
        ) from error
    key, value = (
        None if x is None else repeat_heads(x, heads).to(dtype) for x, _ in parts.values()
    )
    return Columns(logit, key, value)


def column_logits(q: Tensor, columns: Columns, scale: float) -> Tensor:
    """Logits of the columns: q (B, H, T, d) -> (B, H, T, N), float32 or, for float64, float64."""
    if columns.key is None:
        return columns.logit.to(softmax_dtype(q)).expand(*q.shape[:3], -1)
    key = repeat_heads(columns.key, q.shape[1]).to(softmax_dtype(q))
    return torch.add(columns.logit.to(key.dtype), q.to(key.dtype) @ key.mT, alpha=scale)


def finite(lse: Tensor) -> Tensor:
    """A log-sum-exp to subtract from logits: 0 instead of -inf where nothing may be attended.

    So exp(-inf - lse) is 0, not NaN.
    """
    return lse.masked_fill(lse == -torch.inf, 0)


def join_columns_(out: Tensor, lse: Tensor, logits: Tensor, value: Tensor | None) -> Tensor:
    """Adds columns to a finished attention; returns the new lse (B, H, T).

    out (B, H, T, dv) is changed in place; lse (B, H, T), logits (B, H, T, N).

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
        out.mul_((-lead).sigmoid().to(out.dtype))
    else:
        value = value if alone else (logits - finite(total)).exp() @ value
        out.lerp_(value.to(out.dtype), lead.sigmoid().to(out.dtype))
    return torch.logaddexp(lse, total).squeeze(-1)
