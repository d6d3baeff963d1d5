"""One attention of one forward, in the form that the core takes, whatever the host's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from biassurgery.ops.masks import lower_right


class Call(NamedTuple):
    """What an attention module has computed when it comes to the softmax.

    Attributes:
        q: queries (B, H, T, d), positions applied.
        k, v: keys (B, Hkv, S, d) and values (B, Hkv, S, dv), cached ones included.
        mask: None, bool (True: may attend) or added to the logits, broadcastable to (B, H, T, S).
        causal: whether query t sees keys up to S - T + t only, besides the mask.
        scale: of the logits.
        dropout: probability of dropping an attention weight.
        softcap: bound of the logits; None: none.
        sinks: (H,) logits of a sink of the host's own (gpt-oss); None: none.
        window: how many keys, its own included, a query sees at most; None: all. The mask says so
            too.
        cache: the layer of a `SinkCache` that the keys come from; None: of another cache, or none.
        weights: where the shares (B, H, T, S) of the keys are left for a host that returns them, as
            a part of the output's graph; None: it does not.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    dropout: float = 0.0
    softcap: float | None = None
    sinks: Tensor | None = None
    window: int | None = None
    cache: Any = None
    weights: list[Tensor] | None = None

    def plain(self) -> bool:
        """Whether it is one query that sees all keys, and nothing is asked for but the outputs."""
        return (
            self.q.shape[2] == 1
            and self.mask is self.softcap is self.sinks is self.cache is self.weights is None
            and not self.dropout
        )

    def seen(self) -> Tensor:
        """(1 or B, 1 or H, T, S) bool: which keys each query sees."""
        queries = self.q.shape[-2]
        keys = self.k.shape[-2]
        if self.causal:
            seen = lower_right(queries, keys, self.q.device)[None, None]
        else:
            seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=self.q.device)
        if self.mask is not None:
            seen = seen & visible(self.mask)
        return seen


def visible(mask: Tensor) -> Tensor:
    """Where a mask lets a query attend.

    Elsewhere implementations write -inf or the smallest number of the dtype.
    """
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
