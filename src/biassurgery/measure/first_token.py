"""The first token of a sequence: how much attention it gets, and what its eviction costs."""

from __future__ import annotations

import torch
from torch import Tensor

from biassurgery.adapters.attentions import attentions
from biassurgery.adapters.registry import Host
from biassurgery.errors import UnsupportedModel
from biassurgery.ops.attend import attend
from biassurgery.ops.columns import Columns
from biassurgery.surgery.attention import Attention, AttentionEdit, EditedAttention
from biassurgery.surgery.call import Call
from biassurgery.surgery.edit import Place, edits_of
from biassurgery.surgery.shares import shares


class FirstShare(AttentionEdit):
    """Keeps the share of attention that later tokens pay to the first one, mean over heads."""

    child = "first_token_share"
    paid: float | None = None

    def __init__(self, route: type[EditedAttention]) -> None:
        super().__init__()
        self.route = route

    def see(self, call: Call, columns: Columns | None, out: Tensor, lse: Tensor) -> None:
        first = torch.zeros(len(call.q), 1, dtype=torch.int64, device=call.q.device)
        later = shares(call, lse, first)[:, :, 1:]
        self.paid = later.mean().item() if later.numel() else 0.0


class EvictFirst(AttentionEdit):
    """From one query on, the first token's key and value have left the cache.

    Tokens in between have seen it, as they have in a server that evicts it then.

    Args:
        route: the way of the attention to this library's core.
        since: the first query that does not see it.
    """

    child = "first_token_evicted"

    def __init__(self, route: type[EditedAttention], since: int) -> None:
        super().__init__()
        self.route = route
        self.since = since

    def change(self, call: Call, out: Tensor, attention_input: Tensor | None) -> Tensor:
        sinks = call.sinks
        columns = None if sinks is None else Columns(sinks[:, None, None], None, None)
        late, _ = attend(
            call.q[:, :, self.since :],
            call.k[:, :, 1:],
            call.v[:, :, 1:],
            mask=self._mask(call.mask),
            causal=call.causal,
            scale=call.scale,
            dropout=0.0,
            softcap=call.softcap,
            columns=columns,
        )
        return torch.cat([out[:, :, : self.since], late.to(out.dtype)], 2)

    def _mask(self, mask: Tensor | None) -> Tensor | None:
        """The mask of those queries and keys; an axis of 1 is for all."""
        if mask is None:
            return None
        mask = mask[..., self.since :, :] if mask.shape[-2] > 1 else mask
        return mask[..., 1:] if mask.shape[-1] > 1 else mask


def routed(host: Host) -> dict[int, Attention]:
    """The attention of every layer that attends.

    Raises:
        UnsupportedModel: one cannot be led to the core, or has a patch with columns of its own.
    """
    found = attentions(host)
    patched = [
        layer
        for layer, attention in found.items()
        if any(isinstance(edit, AttentionEdit) for edit in edits_of(attention.module))
    ]
    if patched:
        raise UnsupportedModel(f"model: a patch is on the attention of blocks {patched}")
    return found


def watches(found: dict[int, Attention]) -> list[Place]:
    """The edits that measure the share of the first token."""
    return [
        attention.place(layer, FirstShare(attention.route)) for layer, attention in found.items()
    ]


def evictions(found: dict[int, Attention], since: int) -> list[Place]:
    """The edits that evict it."""
    return [
        attention.place(layer, EvictFirst(attention.route, since))
        for layer, attention in found.items()
    ]


def shares_of(places: list[Place]) -> dict[int, float]:
    """What the watches have seen, by layer."""
    return {
        place.layer: place.edit.paid
        for place in places
        if isinstance(place.edit, FirstShare)
        and place.edit.paid is not None
        and place.layer is not None
    }
