"""What attention is made of: its logits, shares of chosen keys and columns, and their output.

Sun et al. 2024, section 4: sum_i p_i v_i = sum_{i in C} p_i v_i + sum_{i not in C} p_i v_i. For a
small set C of keys each part follows from q, k_C, v_C and the log-sum-exp of `attend` in O(T |C|
d), without the T x S matrix.
"""

from __future__ import annotations

import math

from torch import Tensor

from biassurgery.ops.columns import Columns, column_logits, finite
from biassurgery.ops.heads import repeat_heads, softmax_dtype
from biassurgery.ops.masks import additive


def attention_logits(
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """All logits, -inf where masked: q (B, H, T, d), k (B, Hkv, S, d) -> (B, H, T, S).

    float32, or float64 for float64. mask, causal, scale and softcap as `attend` has them.
    """
    dtype = softmax_dtype(q)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    logits = q.to(dtype) @ repeat_heads(k, q.shape[1]).to(dtype).mT * scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    added = additive(mask, causal, q, k, dtype)
    return logits if added is None else logits + added


def key_probs(
    q: Tensor,
    k_c: Tensor,
    lse: Tensor,
    scale: float | None = None,
    mask_c: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Share of each query's attention on chosen keys: (B, H, T, C).

    q (B, H, T, d), k_c (B, Hkv, C, d), lse (B, H, T).

    mask_c is the mask's part for those keys, broadcastable to (B, H, T, C). A query that may attend
    to nothing gives 0.
    """
    logits = attention_logits(q, k_c, mask=mask_c, scale=scale, softcap=softcap)
    return (logits - finite(lse).unsqueeze(-1)).exp()


def value_updates(p_c: Tensor, v_c: Tensor) -> Tensor:
    """The chosen keys' part of the attention output, sum_{i in C} p_i v_i: (B, H, T, dv).

    p_c (B, H, T, C), v_c (B, Hkv, C, dv).
    """
    return p_c @ repeat_heads(v_c, p_c.shape[1]).to(p_c.dtype)


def bias_mass(q: Tensor, columns: Columns, lse: Tensor, scale: float | None = None) -> Tensor:
    """Share of each query's attention that the columns took: (B, H, T).

    q (B, H, T, d), lse (B, H, T), columns included.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return (column_logits(q, columns, scale) - finite(lse).unsqueeze(-1)).exp().sum(-1)
