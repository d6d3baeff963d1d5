"""Which tokens of a batch may carry massive activations, by one value a channel."""

from __future__ import annotations

import torch
from torch import Tensor

from biassurgery.findings.tally import BINS, magnitude_of
from biassurgery.measure.candidates import Found


def strongest(seen: list[tuple[Found, Tensor]], roles: int, width: int, tokens: int) -> Found:
    """Of each token and channel the candidate that is furthest beyond the definition at its block.

    One a channel will do to tell whether the token carries a massive activation, and keeps the
    kinds of tokens few, for a value stays in its channel over many blocks.

    Args:
        seen: the candidates of each block, and the definition's thresholds (B,) there.
        roles, width: how many roles and channels there are.
        tokens: of a row.
    """
    if not seen:
        nothing = torch.zeros(0, dtype=torch.int64, device="cpu")
        return Found(nothing, nothing, nothing)
    row, token, key = (torch.cat(parts) for parts in zip(*(found for found, _ in seen)))
    threshold = torch.cat([threshold[found.row] for found, threshold in seen])
    channel = key // BINS // 2 // roles % width
    spot = (row * tokens + token) * width + channel
    order = (magnitude_of(key) / threshold).argsort()
    order = order[spot[order].argsort(stable=True)]
    last = torch.ones(len(order), dtype=torch.bool, device="cpu")
    last[:-1] = spot[order][1:] != spot[order][:-1]
    chosen = order[last]
    return Found(row[chosen], token[chosen], key[chosen])
