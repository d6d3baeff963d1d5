"""One query of one sequence beside one more key and value, as in a step of cached decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from biassurgery.ops.heads import repeat_heads
from biassurgery.ops.kernels import KERNELS, Inputs, choose_kernel


def attend_one(
    q: Tensor, k: Tensor, v: Tensor, logit: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor | None:
    """`attend` without a mask, with one column, by as few operators as there can be.

    A step of decoding costs what its operators cost to start. q (1, H, 1, d), k and v (1, Hkv, S,
    d); of the column logit (H, 1), key and value (Hkv, d). None: the tensors are others, or a
    gradient, autocast or a compiler asks for the way that serves all.
    """
    if torch.compiler.is_compiling() or not _fits(q, k, v, logit, key, value):
        return None
    name = choose_kernel(q, k, v, None, False)
    if name is None:
        return None
    shared, size = key.shape
    if not KERNELS[name].grouped:
        k = repeat_heads(k, q.shape[1])
        v = repeat_heads(v, q.shape[1])
    out, lse, _ = KERNELS[name].forward(Inputs(q, k, v, None, False, scale))
    keys = lse.view(shared, -1, 1).sub_(logit.view(shared, -1, 1))
    queries = q.view(shared, -1, size)
    # `data`, for a view of a parameter takes twice as long as one of a tensor.
    lead = torch.baddbmm(keys, queries, key.data.unsqueeze(2), beta=-1, alpha=scale)
    out.view(shared, -1, size).lerp_(value.data.unsqueeze(1), lead.sigmoid_())
    return out


def _fits(q: Tensor, k: Tensor, v: Tensor, logit: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend_one` takes these, as they come to a step of float32 or float64."""
    shared, size = key.shape
    dtype = q.dtype
    return (
        q.shape == (1, len(logit), 1, size)
        and k.shape == (1, shared, k.shape[2], size)
        and k.shape == v.shape
        and key.shape == value.shape
        and dtype == k.dtype == v.dtype == logit.dtype == key.dtype == value.dtype
        and dtype in (torch.float32, torch.float64)
        and q.is_contiguous()
        and k.is_contiguous()
        and v.is_contiguous()
        and not torch.is_autocast_enabled("cpu" if q.is_cpu else q.device.type)
        and not (
            torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, logit, key, value))
        )
    )
