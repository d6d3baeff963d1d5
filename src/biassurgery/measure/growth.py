"""How much massive values grow from block to block, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Large(NamedTuple):
    """The values above the floor in one block output, (N,) each, on the CPU.

    Where they are, what they are (float64), and the definition's threshold there.
    """

    layer: int
    channel: Tensor
    role: Tensor
    row: Tensor
    token: Tensor
    value: Tensor
    threshold: Tensor

    @property
    def massive(self) -> Tensor:
        """(N,) bool, which of them meet the definition; as float32, which medians are."""
        return self.value.abs().float() > self.threshold.float()


class Growth(NamedTuple):
    """By how much values grew, (P,) each: of a channel, from the output of a block to another's."""

    channel: Tensor
    start: Tensor
    end: Tensor
    growth: Tensor


def growth_of(outputs: Sequence[Large], layers: int) -> list[Growth]:
    """The growth of massive values of one batch that meets the definition itself.

    A value x of block b that meets it is compared with what its token has in that channel at each
    block a before (0 where that is below the floor): would anything massive be left at b, had the
    value been taken away at a? It would if |x_b - x_a| is beyond the threshold at b.

    Args:
        outputs: the large values of each block that has any.
        layers: of the model.
    """
    hit = [large.channel[large.massive] for large in outputs]
    channels = torch.cat(hit).unique() if hit else torch.zeros(0, dtype=torch.int64)
    kept = [_of_channels(large, channels) for large in outputs]
    if not len(channels):
        return []
    tokens = 1 + max(int(large.token.max()) for large in kept if len(large.token))
    rows = 1 + max(int(large.row.max()) for large in kept if len(large.row))
    # A spot is a channel of a token; the table has its value at every block.
    spots = [(large.channel * rows + large.row) * tokens + large.token for large in kept]
    known = torch.cat(spots).unique()
    table = torch.zeros(layers, len(known), dtype=torch.float64, device="cpu")
    grown = []
    for large, spot in sorted(zip(kept, spots), key=lambda pair: pair[0].layer):
        column = torch.searchsorted(known, spot)
        table[large.layer, column] = large.value
        massive = large.massive
        before = table[: large.layer, column[massive]]
        growth = (large.value[massive] - before).abs()
        start, which = (growth > large.threshold[massive]).nonzero(as_tuple=True)
        grown.append(
            Growth(
                large.channel[massive][which],
                start,
                torch.full_like(start, large.layer),
                growth[start, which],
            )
        )
    return grown


def _of_channels(large: Large, channels: Tensor) -> Large:
    chosen = torch.isin(large.channel, channels)
    return Large(large.layer, *(part[chosen] for part in large[1:]))
