"""The start tokens of a batch, and how they are read without what stands behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from biassurgery.adapters.registry import Host
from biassurgery.measure.sequences import START

_BY_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
_NOT_READ = ("labels",)


def starts_of(host: Host, batch: Mapping[str, Any]) -> Tensor:
    """(N, 2) the row and the position of every start token of a batch."""
    shape = batch.get("input_ids", batch.get("inputs_embeds")).shape  # type: ignore[union-attr]
    return (host.adapter.token_roles(host.model, batch, (shape[0], shape[1])) == START).nonzero()


def alone(host: Host, batch: Mapping[str, Any], starts: Tensor) -> dict[str, Any] | None:
    """A batch in which every start token (N, 2) is a sequence of its own, of one token.

    In a causal model it sees itself alone whatever stands behind it, so that its keys and values
    are the same, at the cost of one token a sequence.

    Returns:
        The batch; None where the model is not causal, or it is not known what of an argument
        belongs to a start token.
    """
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if tokens is None or not host.adapter.causal(host.model) or not len(starts):
        return None
    rows, length = tokens.shape[:2]
    chosen: dict[str, Any] = {}
    for name, value in batch.items():
        if name in _NOT_READ:
            continue
        if isinstance(value, Tensor):
            if name not in _BY_TOKEN or tuple(value.shape[:2]) not in ((rows, length), (1, length)):
                return None
            row, token = starts.to(value.device).unbind(1)
            value = value.expand(rows, *value.shape[1:])[row, token][:, None]
        chosen[name] = value
    return chosen


def places_alone(starts: Tensor) -> Tensor:
    """(N, 2) the row and the position of the start tokens in that batch."""
    first = torch.zeros_like(starts)
    first[:, 0] = torch.arange(len(starts), device=starts.device)
    return first
