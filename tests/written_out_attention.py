"""Attention written out: float64 softmaxes of what a model hands to sdpa."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from tests.models import HEADS, LAYERS


class Dense(TorchFunctionMode):
    """Within it, every call of sdpa is also written out in float64.

    `calls[i]` has q, k, v (per query head), logits, probs and out.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is scaled_dot_product_attention:
            self.calls.append(written_out(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def written_out(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    assert not dropout_p
    q, k, v = (x.double() for x in (query, key, value))
    # One query whose heads stand in the place of queries, one group of heads after the other.
    if q.shape[1] < HEADS:
        q = q.flatten(1, 2)[:, :, None]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bhtd,bhsd->bhts", q, k) * scale
    if is_causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        logits = logits.masked_fill(~seen, -torch.inf)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        else:  # hosts write the smallest number of the dtype where a query must not look
            logits = (logits + attn_mask).masked_fill(attn_mask < -1e30, -torch.inf)
    probs = logits.softmax(-1)
    return SimpleNamespace(q=q, k=k, v=v, logits=logits, probs=probs, out=probs @ v)


@torch.no_grad()
def dense(model, *args, **kwargs):
    """What each layer's attention computes in one forward: float64, from what it hands to sdpa."""
    with Dense() as seen:
        model(*args, **kwargs)
    assert len(seen.calls) == LAYERS
    return seen.calls
