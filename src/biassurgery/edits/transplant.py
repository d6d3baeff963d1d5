"""The explicit bias that stands for a start token which is no longer in the input."""

from __future__ import annotations

import torch
from torch import Tensor

from biassurgery.adapters.registry import Host
from biassurgery.edits.bias import Initial, KeyValueBias
from biassurgery.errors import UnsupportedModel
from biassurgery.findings.key_values import KeyValues
from biassurgery.ops.columns import Columns
from biassurgery.ops.heads import repeat_heads, softmax_dtype
from biassurgery.surgery.attention import Attention
from biassurgery.surgery.call import Call


class TransplantEdit(KeyValueBias):
    """k', v' of the start token, seen by the queries that saw it, at the distance at which it was.

    Args:
        attention: that it is for.
        slopes: (H,) how much the logit of a key grows with its position (ALiBi); None: positions
            are not in the logits.
    """

    slopes: Tensor | None
    reads_cache = True
    reads_call = True

    def __init__(self, attention: Attention, slopes: Tensor | None) -> None:
        super().__init__(attention, Initial(zero_effect=False, std=0.0))
        self.child = "transplant"
        self.register_buffer("slopes", slopes, persistent=False)

    def columns(self, call: Call) -> Columns:
        logit, key, value = super().columns(call)
        if self.slopes is not None:
            logit = logit + self._before_the_first(call)
        if call.window is not None:
            # A query that sees as many keys as the window holds is too far from the start.
            far = call.seen().sum(-1, keepdim=True) >= call.window
            logit = torch.where(far, -torch.inf, logit)
        if call.cache is None and call.softcap is None:
            return Columns(logit, key, value)
        assert key is not None  # kind kv has one
        # In an endless stream k' keeps its distance to the window, as sinks do; its logit is capped
        # as the start token's own was.
        turned = key[None]  # (1 or B, Hkv, 1, d)
        if call.cache is not None:
            turned = call.cache.turn_start(turned)
        dtype = softmax_dtype(call.q)
        keys = repeat_heads(turned, call.q.shape[1]).to(dtype)
        column = call.scale * (call.q.to(dtype) @ keys.mT)
        if call.softcap is not None:
            column = call.softcap * (column / call.softcap).tanh()
        return Columns(logit + column, None, value)

    def one_query(self, call: Call) -> Tensor | None:
        near = call.window is None or call.k.shape[2] < call.window
        return super().one_query(call) if near and self.slopes is None else None

    def _before_the_first(self, call: Call) -> Tensor:
        """(B, H, T, 1) what ALiBi adds one position before the first key that a query sees."""
        if call.mask is None or call.mask.dtype == torch.bool:
            raise UnsupportedModel(
                "model: its attention reached the core without the positions in the mask; unpatch"
                " 'transplant'."
            )
        first = call.seen().int().argmax(-1, keepdim=True)  # (B, 1 or H, T, 1)
        mask = call.mask.expand(-1, -1, first.shape[2], -1)
        at_first = mask.gather(-1, first.expand(*mask.shape[:3], 1))
        assert self.slopes is not None
        return at_first - self.slopes[:, None, None].to(at_first.dtype)


def transplant_edit(
    host: Host, layer: int, attention: Attention, key_values: KeyValues
) -> TransplantEdit:
    """The start token of one layer as an explicit bias."""
    edit = TransplantEdit(attention, host.adapter.alibi(host.model, attention.module))
    edit.fill(key_values.keys[layer], key_values.values[layer])
    return edit
