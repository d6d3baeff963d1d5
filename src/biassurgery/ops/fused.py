"""Attention by torch's fused kernels, with columns that join their output and their backward.

A backward kernel computes P = exp(logit - lse) and dS = P (dP - rowsum(dO * out)) anew. Called with
the lse and the output of the whole softmax, columns included, it so gives the exact gradients of q,
k and v; those of the columns are added by hand. As in torch, a query whose keys all have a mask's
lowest finite number (instead of -inf) has the right output but, without columns, no meaningful
gradient: the log-sum-exp cannot hold more than that number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from biassurgery.ops.columns import Columns, column_logits, expand_columns, finite, join_columns_
from biassurgery.ops.heads import repeat_heads
from biassurgery.ops.kernels import KERNELS, choose_kernel, kernel_mask
from biassurgery.ops.masks import blind


def fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float,
    columns: Columns | None = None,
) -> tuple[Tensor, Tensor] | None:
    """`attend` without dropout, softcap or gradient of the mask; None where no kernel takes it."""
    name = choose_kernel(q, k, v, mask, causal)
    if name is None:
        return None
    # Outside of `_Fused`, so that autograd itself adds up what broadcasting and casting repeat.
    logit, key, value = (None, None, None) if columns is None else expand_columns(columns, q, v)
    if not KERNELS[name].grouped:
        k = repeat_heads(k, q.shape[1])
        v = repeat_heads(v, q.shape[1])
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    added, causal = kernel_mask(name, mask, causal, q, k)
    arguments = (q, k, v, logit, key, value, added, causal, scale, name)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:6]):
        return _Fused.apply(*arguments)
    out, lse, _, _ = _forward(*arguments)
    return out, lse


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logit: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    name: str,
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, ...]]:
    """out, lse, the columns' logits, and what the kernel's backward needs besides."""
    out, lse, saved = KERNELS[name].forward(q, k, v, mask, causal, scale)
    if mask is not None:
        # Of a query that may attend to nothing the CPU's kernel says lse 0 and out 0; of what the
        # others say nothing is assumed.
        nothing = blind(mask).expand(lse.shape)
        lse = lse.masked_fill(nothing, -torch.inf)
        if name != "cpu":
            out = out.masked_fill(nothing.unsqueeze(-1), 0)
    logits = None
    if logit is not None:
        logits = column_logits(q, Columns(logit, key), scale)
        lse = join_columns_(out, lse, logits, value)
    return out, lse, logits, saved


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        q, k, v, logit, key, value, mask, causal, scale, name = arguments
        out, lse, logits, saved = _forward(q, k, v, logit, key, value, mask, causal, scale, name)
        ctx.save_for_backward(q, k, v, out, lse, logits, key, value, mask, *saved)
        ctx.causal = causal
        ctx.scale = scale
        ctx.name = name
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse, logits, key, value, mask, *saved = ctx.saved_tensors
        # Where nothing may be attended, exp(-inf - -inf) would be NaN.
        lse = finite(lse)
        # `out` and `lse` are those of the whole softmax, columns included. With p = exp(s - lse)
        # the shares of the keys come out right, and with D = rowsum(dO * out), which is the sum of
        # p dP over keys AND columns, so does ds = p (dP - D). The kernel does this for the keys.
        grad_q, grad_k, grad_v = KERNELS[ctx.name].backward(
            grad, q, k, v, out, lse, saved, mask, ctx.causal, ctx.scale
        )
        grad_logit = grad_key = grad_value = None
        if logits is not None:
            # The same for the columns, by hand: p' = exp(s' - lse), dv' = p' dO, ds' = p' (dO v' -
            # D), and through s' = scale q k' + logit on to the logit, k' and q.
            with torch.autocast(q.device.type, enabled=False):
                grad = grad.to(lse.dtype)
                probs = (logits - lse.unsqueeze(-1)).exp()  # (B, H, T, N)
                grad_probs = -(grad * out).sum(-1, keepdim=True)  # -D; a column without value: dP 0
                if value is not None:
                    grad_probs = grad_probs + grad @ value.mT
                    grad_value = torch.einsum("bhtn,bhtd->hnd", probs, grad)
                grad_logit = probs * grad_probs
                if key is not None:
                    by_key = torch.einsum("bhtn,bhtd->hnd", grad_logit, q.to(lse.dtype))
                    grad_key = by_key * ctx.scale
                    grad_q.add_(grad_logit @ (key * ctx.scale))
        return grad_q, grad_k, grad_v, grad_logit, grad_key, grad_value, None, None, None, None
