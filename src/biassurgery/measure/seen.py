"""What one attention computes in one forward, worked out as far as somebody asks for it."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from biassurgery.ops.columns import Columns, column_logits, finite
from biassurgery.ops.decompose import attention_logits, bias_mass
from biassurgery.surgery.call import Call
from biassurgery.surgery.shares import shares


class SinkTokens(NamedTuple):
    """Whose share of the attention is asked for.

    Attributes:
        positions: (C,) in the sequence, cached tokens included.
        counts: (B, T or 1, C) bool: which of them count for a query; None: all.
        length: how many tokens the sequence has so far.
    """

    positions: Tensor
    counts: Tensor | None
    length: int


class SeenAttention:
    """One attention of one forward.

    Everything but what is given is computed when it is read, and once. B sequences, H query heads,
    T queries, S keys (cached ones included), d channels of a key, dv of a value; query heads share
    Hkv key-value heads.

    Attributes:
        call: `q` (B, H, T, d), `k` (B, Hkv, S, d), `v` (B, Hkv, S, dv), positions applied; `mask`,
            `causal`, `scale`, `softcap`.
        columns: the explicit biases on the attention; None: none.
        out: (B, H, T, dv) what the heads return.
        sinks: the tokens whose share is asked for.
        attention_input: (B, T, D) what the attention module reads, and
        output: (B, T, D) what it gives to the residual stream: both for quantities `at = "module"`.
    """

    attention_input: Tensor
    output: Tensor

    def __init__(
        self,
        call: Call,
        columns: Columns | None,
        out: Tensor,
        lse: Tensor,
        sinks: SinkTokens,
        exact_gradient: bool,
    ) -> None:
        self.call = call
        self.columns = columns
        self.out = out
        self.sinks = sinks
        self._core_lse = lse
        self._exact_gradient = exact_gradient

    @cached_property
    def lse(self) -> Tensor:
        """(B, H, T) float32, the log-sum-exp of each query's logits, explicit biases included."""
        if not self._exact_gradient:
            return self._core_lse
        # The core's own has no gradient, so it is computed again. The gradient of a query that sees
        # nothing would be NaN: it gets 0 in the place of its logits, and -inf as the result.
        logits = self._logits
        nothing = (logits == -torch.inf).all(-1)
        lse = logits.masked_fill(nothing[..., None], 0).logsumexp(-1)
        lse = lse.masked_fill(nothing, -torch.inf)
        if self.columns is None:
            return lse
        biases = column_logits(self.call.q, self.columns, self.call.scale).logsumexp(-1)
        return torch.logaddexp(lse, biases)

    @cached_property
    def logits(self) -> Tensor:
        """(B, H, T, S) float32, scaled, -inf where a query does not look."""
        return self._logits.masked_fill(~self.call.seen(), -torch.inf)

    @cached_property
    def probs(self) -> Tensor:
        """(B, H, T, S) float32, the attention; to a sum of 1 lacks what explicit biases take."""
        return (self._logits - finite(self.lse)[..., None]).exp()

    @cached_property
    def bias_mass(self) -> Tensor:
        """(B, H, T) float32, the share that explicit biases take."""
        if self.columns is None:
            return torch.zeros_like(self.lse)
        return bias_mass(self.call.q, self.columns, self.lse, self.call.scale)

    @cached_property
    def sink_keys(self) -> Tensor:
        """(B, C) int64: which key each of the sinks is.

        Below 0 or beyond the keys where it has left the cache. A sliding cache that holds the last
        4 of 10 tokens has its token 0 at key 0 - (10 - 4) = -6, its token 7 at key 1.
        """
        keys = self.call.k.shape[2]
        if self.call.cache is None:
            at = self.sinks.positions[None] - max(0, self.sinks.length - keys)
        else:
            at = self.call.cache.index_of(self.sinks.positions)
        return at.to(self.call.k.device).expand(len(self.call.k), -1)

    @cached_property
    def sink_shares(self) -> Tensor:
        """(B, H, T, C) float32: each query's attention on each sink; 0 if it has left the cache."""
        keys = self.call.k.shape[2]
        cached = (self.sink_keys >= 0) & (self.sink_keys < keys)
        share = shares(self.call, self.lse, self.sink_keys.clamp(0, keys - 1))
        share = share * cached[:, None, None]
        if self.sinks.counts is not None:
            share = share * self.sinks.counts.to(share.device)[:, None]
        return share

    @cached_property
    def _logits(self) -> Tensor:
        """(B, H, T, S) float32 with what the mask adds, be it -inf or a large negative number."""
        call = self.call
        return attention_logits(
            call.q,
            call.k,
            mask=call.mask,
            causal=call.causal,
            scale=call.scale,
            softcap=call.softcap,
        )


def sinks_of(
    batch: dict[str, Any], rows: int, queries: int, cached: int, tokens: tuple[int, ...] | None
) -> SinkTokens:
    """The sinks of one forward: given positions, or the start token of each sequence.

    In a row of two documents, `position_ids` 0 1 2 0 1, the five queries have their start tokens
    at                                        0 0 0 3 3.

    Args:
        batch: the arguments of the model's forward by name.
        rows, queries: of what it reads.
        cached: tokens that it has read before.
        tokens: given positions; None: start tokens, by `attention_mask` (B, S) and, in packed
            sequences, `position_ids` (B, T).
    """
    length = cached + queries
    if tokens is not None:
        return SinkTokens(torch.tensor(tokens), None, length)
    starts = torch.zeros(rows, 1, dtype=torch.int64)  # (B, 1), or (B, T) one a query
    mask = batch.get("attention_mask")
    positions = batch.get("position_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        starts = mask.bool().int().argmax(1, keepdim=True).cpu()
    if isinstance(positions, Tensor) and positions.dim() == 2:
        places = torch.arange(cached, length)
        is_start = (positions == 0).cpu().expand(rows, -1) & (places >= starts)
        latest = torch.where(is_start, places, 0).cummax(1).values
        starts = torch.maximum(latest, starts)
    unique = starts.unique()
    return SinkTokens(unique, starts[..., None] == unique, length)
