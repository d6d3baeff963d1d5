"""The start tokens of a batch, and how they are read without what stands behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from biassurgery.adapters.registry import Host
from biassurgery.measure.sequences import START

_IDS = ("input_ids", "position_ids")
_MASK = "attention_mask"


def starts_of(host: Host, batch: Mapping[str, Any]) -> Tensor:
    """(N, 2) the row and the position of every start token of a batch."""
    shape = batch.get("input_ids", batch.get("inputs_embeds")).shape  # type: ignore[union-attr]
    return (host.adapter.token_roles(host.model, batch, (shape[0], shape[1])) == START).nonzero()


class Alone(NamedTuple):
    """Start tokens without what stands behind them.

    Attributes:
        batch: every different one of them, as a sequence of one token.
        places: (N, 2) int64, the row and the position in it of each of the N start tokens.
    """

    batch: dict[str, Any]
    places: Tensor


def alone(host: Host, batch: Mapping[str, Any], starts: Tensor) -> Alone | None:
    """The start tokens (N, 2) of a batch by themselves.

    In a causal model a start token sees itself alone whatever stands behind it, so that its keys
    and values are the same, at the cost of one token.

    Returns:
        None where the model is not causal, or it is not known what of an argument belongs to a
        start token.
    """
    given = {name: x for name, x in batch.items() if isinstance(x, Tensor) and name != "labels"}
    ids = given.get("input_ids")
    if ids is None or not host.adapter.causal(host.model) or not len(starts):
        return None
    shapes = [tuple(x.shape) for name, x in given.items() if name != _MASK]
    if not set(given) <= {*_IDS, _MASK} or set(shapes) - {tuple(ids.shape), (1, ids.shape[1])}:
        return None
    row, token = starts.to(ids.device).unbind(1)
    names = [name for name in _IDS if name in given]
    of_start = torch.stack([given[name].expand_as(ids)[row, token] for name in names], 1)
    different, which = of_start.long().unique(dim=0, return_inverse=True)
    chosen = {name: x for name, x in batch.items() if name not in given and name != "labels"}
    for name, column in zip(names, different.unbind(1)):
        chosen[name] = column[:, None].to(given[name].dtype)
    if _MASK in given:
        chosen[_MASK] = torch.ones_like(different[:, :1]).to(given[_MASK].dtype)
    return Alone(chosen, torch.stack([which, torch.zeros_like(which)], 1))
