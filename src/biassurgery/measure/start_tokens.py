"""The start tokens of a batch, and how they are read without what stands behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from biassurgery.adapters.registry import Host
from biassurgery.adapters.text import START

_BY_TOKEN = ("input_ids", "inputs_embeds", "position_ids")
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
    tokens = given.get("input_ids", given.get("inputs_embeds"))
    if tokens is None or not host.adapter.causal(host.model) or not len(starts):
        return None
    rows, length = tokens.shape[:2]
    shapes = {tuple(x.shape[:2]) for name, x in given.items() if name != _MASK}
    if not set(given) <= {*_BY_TOKEN, _MASK} or shapes - {(rows, length), (1, length)}:
        return None
    names = [name for name in _BY_TOKEN if name in given]
    row, token = starts.cpu().unbind(1)
    parts = [given[name].expand(rows, *given[name].shape[1:])[row, token] for name in names]
    # In float64 all of them are exact.
    flat = [part.reshape(len(starts), -1).cpu().double() for part in parts]
    different, which = torch.cat(flat, 1).unique(dim=0, return_inverse=True)
    chosen = {name: x for name, x in batch.items() if name not in given and name != "labels"}
    for name, part, values in zip(names, parts, different.split([x.shape[1] for x in flat], 1)):
        chosen[name] = values.reshape(-1, 1, *part.shape[1:]).to(part)
    if _MASK in given:
        chosen[_MASK] = given[_MASK].new_ones(len(different), 1)
    return Alone(chosen, torch.stack([which, torch.zeros_like(which)], 1))
