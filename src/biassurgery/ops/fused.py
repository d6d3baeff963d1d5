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

from biassurgery.ops.columns import (
    Columns,
    check_columns,
    column_logits,
    expand_columns,
    finite,
    join_columns_,
)
from biassurgery.ops.heads import repeat_heads
from biassurgery.ops.kernels import KERNELS, Inputs, choose_kernel, kernel_mask
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
    trained = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, *(columns or ()))
    )
    if columns is not None and trained:
        # Outside of `_Fused`, so that autograd itself adds up what broadcasting and casting repeat.
        columns = expand_columns(columns, q, v)
    elif columns is not None:
        check_columns(columns, q, v)
    if not KERNELS[name].grouped:
        k = repeat_heads(k, q.shape[1])
        v = repeat_heads(v, q.shape[1])
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    inputs = Inputs(q, k, v, *kernel_mask(name, mask, causal, q, k), scale)
    if trained:
        # Flat, for autograd sees only tensors that are arguments themselves.
        return _Fused.apply(name, *inputs, *(columns or (None, None, None)))
    out, lse, _, _ = _forward(name, inputs, columns)
    return out, lse


def _forward(
    name: str, inputs: Inputs, columns: Columns | None
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, ...]]:
    """out, lse, the columns' logits, and what the kernel's backward needs besides."""
    out, lse, saved = KERNELS[name].forward(inputs)
    if inputs.mask is not None:
        # Of a query that may attend to nothing the CPU's kernel says lse 0 and out 0; of what the
        # others say nothing is assumed.
        nothing = blind(inputs.mask).expand(lse.shape)
        lse = lse.masked_fill(nothing, -torch.inf)
        if name != "cpu":
            out = out.masked_fill(nothing.unsqueeze(-1), 0)
    logits = None
    if columns is not None:
        logits = column_logits(inputs.q, columns, inputs.scale)
        lse = join_columns_(out, lse, logits, columns.value)
    return out, lse, logits, saved


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        q, k, v, mask, causal, scale, logit, key, value = arguments
        columns = None if logit is None else Columns(logit, key, value)
        out, lse, logits, saved = _forward(name, Inputs(q, k, v, mask, causal, scale), columns)
        ctx.save_for_backward(q, k, v, out, lse, logits, key, value, mask, *saved)
        ctx.causal = causal
        ctx.scale = scale
        ctx.name = name
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, logits, key, value, mask, *saved = ctx.saved_tensors
        # Where nothing may be attended, exp(-inf - -inf) would be NaN.
        lse = finite(lse)
        # `out` and `lse` are those of the whole softmax, columns included. With p = exp(s - lse)
        # the shares of the keys come out right, and with D = rowsum(dO * out), which is the sum of
        # p dP over keys AND columns, so does ds = p (dP - D). The kernel does this for the keys.
        inputs = Inputs(q, k, v, mask, ctx.causal, ctx.scale)
        grad_q, grad_k, grad_v = KERNELS[ctx.name].backward(grad, inputs, out, lse, tuple(saved))
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
        # In the order of the arguments: name, inputs, columns.
        return None, grad_q, grad_k, grad_v, None, None, None, grad_logit, grad_key, grad_value
