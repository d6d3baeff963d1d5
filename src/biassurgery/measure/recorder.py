"""Watching one attention module: what `record` gets from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from biassurgery.ops.columns import Columns, column_logits, finite
from biassurgery.ops.decompose import attention_logits, bias_mass, value_updates
from biassurgery.surgery.attention import AttentionEdit, EditedAttention
from biassurgery.surgery.call import Call
from biassurgery.surgery.shares import keys_at, shares

AttentionName = Literal[
    "norm_output",
    "attention_output",
    "q",
    "k",
    "v",
    "logits",
    "probs",
    "sink_mass",
    "bias_mass",
    "value_updates",
]
NAMES = get_args(AttentionName)
Keep = Callable[[str, Tensor], None]


class SinkTokens(NamedTuple):
    """Whose share of the attention is asked for.

    Attributes:
        positions: (C,) in the sequence, cached tokens included.
        mine: (B, T or 1, C) bool: which of them count for a query; None: all.
        length: how many tokens the sequence has so far.
    """

    positions: Tensor
    mine: Tensor | None
    length: int


class Recorder(AttentionEdit):
    """Hands what was asked for to `keep(name, tensor)` and changes nothing.

    Attributes:
        sinks: of the forward at hand.
    """

    sinks: SinkTokens
    reads_cache = True

    def __init__(
        self, route: type[EditedAttention], names: tuple[str, ...], exact_gradient: bool, keep: Keep
    ) -> None:
        super().__init__()
        self.child = f"recorder_{id(self)}"
        self.route = route
        self.names = names
        self.exact_gradient = exact_gradient
        self.keep = keep
        self.reads_input = not {"norm_output", "attention_output"}.isdisjoint(names)
        if self.reads_input:
            route.check_input()

    def see_output(self, attention_input: Tensor | None, output: Tensor) -> None:
        assert attention_input is not None  # for this edit reads it
        self._give("norm_output", lambda: attention_input)
        self._give("attention_output", lambda: output)

    def see(self, call: Call, columns: Columns | None, out: Tensor, lse: Tensor) -> None:
        if self.exact_gradient:  # the core's own log-sum-exp has none
            lse = _differentiable_lse(call, columns)
        for name, tensor in (("q", call.q), ("k", call.k), ("v", call.v)):
            self._give(name, lambda tensor=tensor: tensor)
        self._give("logits", lambda: _logits(call).masked_fill(~call.seen(), -torch.inf))
        self._give("probs", lambda: (_logits(call) - finite(lse)[..., None]).exp())
        self._give(
            "bias_mass",
            lambda: (
                torch.zeros_like(lse)
                if columns is None
                else bias_mass(call.q, columns, lse, call.scale)
            ),
        )
        if not {"sink_mass", "value_updates"}.isdisjoint(self.names):
            share, keys = self._shares(call, lse)
            self._give("sink_mass", lambda: share.sum(-1))
            self._give("value_updates", lambda: _decomposed(share, keys_at(call.v, keys), out))

    def _give(self, name: str, make: Callable[[], Tensor]) -> None:
        if name in self.names:
            self.keep(name, make())

    def _shares(self, call: Call, lse: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, T, C) the share of each sink, 0 if it has left the cache, and (B, C) where their
        keys are.
        """
        positions, mine, length = self.sinks
        keys = call.k.shape[2]
        at = (
            positions[None] - max(0, length - keys)
            if call.cache is None
            else call.cache.index_of(positions)
        )
        at = at.to(call.k.device).expand(len(call.k), -1)
        here = (at >= 0) & (at < keys)
        at = at.clamp(0, keys - 1)
        share = shares(call, lse, at) * here[:, None, None]
        if mine is not None:
            share = share * mine.to(share.device)[:, None]
        return share, at


def _logits(call: Call) -> Tensor:
    return attention_logits(
        call.q, call.k, mask=call.mask, causal=call.causal, scale=call.scale, softcap=call.softcap
    )


def _differentiable_lse(call: Call, columns: Columns | None) -> Tensor:
    logits = _logits(call)
    nothing = (logits == -torch.inf).all(-1)  # whose gradient would be NaN
    lse = logits.masked_fill(nothing[..., None], 0).logsumexp(-1).masked_fill(nothing, -torch.inf)
    return (
        lse
        if columns is None
        else torch.logaddexp(lse, column_logits(call.q, columns, call.scale).logsumexp(-1))
    )


def _decomposed(share: Tensor, v: Tensor, out: Tensor) -> Tensor:
    """(2, B, H, T, dv): the part of the head outputs from the sinks, and the rest."""
    from_sinks = value_updates(share, v).to(out.dtype)
    return torch.stack([from_sinks, out - from_sinks])


def sinks_of(
    batch: dict[str, Any], rows: int, queries: int, cached: int, tokens: tuple[int, ...] | None
) -> SinkTokens:
    """The sinks of one forward: given positions, or the start token of each sequence.

    Args:
        batch: the arguments of the model's forward by name.
        rows, queries: of what it reads.
        cached: tokens that it has read before.
        tokens: given positions; None: start tokens, by `attention_mask` (B, S) and, in packed
            sequences, `position_ids` (B, T).
    """
    if tokens is not None:
        return SinkTokens(torch.tensor(tokens), None, cached + queries)
    starts = torch.zeros(rows, 1, dtype=torch.int64)
    mask = batch.get("attention_mask")
    positions = batch.get("position_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        starts = mask.bool().int().argmax(1, keepdim=True).cpu()
    if isinstance(positions, Tensor) and positions.dim() == 2:
        new = (positions == 0).cpu().expand(rows, -1) & (
            torch.arange(cached, cached + queries) >= starts
        )
        begun = torch.where(new, torch.arange(cached, cached + queries), 0).cummax(1).values
        starts = torch.maximum(begun, starts)
    unique = starts.unique()
    return SinkTokens(unique, starts[..., None] == unique, cached + queries)
