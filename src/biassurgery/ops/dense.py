"""Attention written out: right for every option and device, differentiable by plain autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from biassurgery.ops.columns import Columns, column_logits, expand_columns
from biassurgery.ops.decompose import attention_logits
from biassurgery.ops.heads import repeat_heads, softmax_dtype
from biassurgery.ops.masks import additive

# Logits held at a time where no gradient needs them all.
MAX_LOGITS = 1 << 24


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    columns: Columns | None = None,
    weights: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend` with the logits written out.

    With `weights`, the shares (B, H, T, S) of the keys are appended to it: those that `out` is made
    of, so that its gradient goes through them.
    """
    dtype = softmax_dtype(q)
    columns = None if columns is None else expand_columns(columns, q, v)
    added = additive(mask, causal, q, k, dtype)
    keys, values = (repeat_heads(x, q.shape[1]).to(dtype) for x in (k, v))

    def rows(chosen: slice) -> tuple[Tensor, Tensor]:
        """out and lse of some of the queries."""
        queries = q[:, :, chosen]
        mask_rows = added if added is None or added.shape[2] == 1 else added[:, :, chosen]
        logits = attention_logits(queries, keys, mask=mask_rows, scale=scale, softcap=softcap)
        if columns is not None:
            part = columns._replace(logit=columns.logit[:, :, chosen])
            logits = torch.cat([logits, column_logits(queries, part, scale)], -1)
        probs, lse = _softmax(logits, dropout)
        of_keys, of_columns = probs.tensor_split([k.shape[2]], -1)
        if weights is not None:
            of_keys = of_keys.to(q.dtype)
            weights.append(of_keys)
        out = of_keys.to(dtype) @ values
        if columns is not None and columns.value is not None:
            out = out + of_columns @ columns.value
        return out.to(q.dtype), lse

    if weights is not None or torch.is_grad_enabled():
        return rows(slice(None))
    return _in_parts(rows, q.shape[2], q.shape[0] * q.shape[1] * k.shape[2])


def _in_parts(
    rows: Callable[[slice], tuple[Tensor, Tensor]], length: int, size: int
) -> tuple[Tensor, Tensor]:
    """What `rows` gives of all queries, of as many at a time as `size` logits each allow."""
    step = max(1, MAX_LOGITS // max(1, size))
    if step >= length:
        return rows(slice(None))
    parts = [rows(slice(start, start + step)) for start in range(0, length, step)]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _softmax(logits: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
    """Probabilities (..., N), 0 for a query that may attend to nothing, and log-sum-exp (...)."""
    lse = logits.detach().logsumexp(-1)
    # Such a query has only -inf, of which softmax makes NaN, forward and backward.
    nothing = (lse == -torch.inf).unsqueeze(-1)
    probs = logits.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
    return functional.dropout(probs, dropout), lse
