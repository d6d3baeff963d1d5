"""Which tokens belong to one sequence: rows without padding, or documents of a packed row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from biassurgery.adapters.base import PADDING
from biassurgery.adapters.registry import Host
from biassurgery.adapters.text import START
from biassurgery.data.batches import MAIN


class Sequences(NamedTuple):
    """Which tokens of a batch belong together.

    A row of two documents behind one token of padding has
        of      -1  0  0  0  1  1
        starts   1  4

    Attributes:
        of: (B, T) int64, the number within its row of the sequence of a token; -1: padding. (B, 1)
            where a row is one sequence, however many tokens it has.
        starts: (B, N) int64, where the sequences of a row start; 0 where a row has fewer than N.
        present: (B, N) bool, which of them there are.
        causal: whether only the tokens from k on attend to token k.
    """

    of: Tensor
    starts: Tensor
    present: Tensor
    causal: bool

    @classmethod
    def read(cls, host: Host, batch: Mapping[str, Any]) -> Sequences:
        """The sequences of a batch; every image, or sound, is one."""
        causal = host.adapter.causal(host.model)
        if host.adapter.modality != "text":
            rows = len(batch[MAIN[host.adapter.modality]])
            zeros = torch.zeros(rows, 1, dtype=torch.int64)
            return cls(zeros, zeros, torch.ones_like(zeros, dtype=torch.bool), causal)
        tokens = batch["input_ids" if "input_ids" in batch else "inputs_embeds"]
        roles = host.adapter.token_roles(host.model, batch, (tokens.shape[0], tokens.shape[1]))
        is_start = roles == START
        of = torch.where(roles == PADDING, -1, is_start.cumsum(1) - 1)
        return cls(of, *positions_of(is_start), causal)

    def queries(self, keys: Tensor, length: int) -> Tensor:
        """Which of `length` queries may attend to the keys at `keys` (B, C): (B, length, C) bool.

        Those of their sequence and, in causal models, not before them.
        """
        of = self.of.to(keys.device).expand(-1, length)
        same = of[:, :, None] == of.gather(1, keys)[:, None]
        if not self.causal:
            return same
        return same & (torch.arange(length, device=keys.device)[:, None] >= keys[:, None])


def positions_of(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Where a mask (B, T) is true: positions (B, C) int64, and which of them there are (B, C) bool.

    Positions are 0 where a row has fewer than C.

        chosen  0 1 0 1    positions  1 3    present  1 1
                0 0 1 0               2 0             1 0
    """
    counts = chosen.sum(1)
    most = max(1, int(counts.max()))
    # A stable sort brings the true ones to the front and keeps their order.
    order = torch.argsort(chosen.int(), dim=1, descending=True, stable=True)[:, :most]
    present = torch.arange(most, device=chosen.device) < counts[:, None]
    return torch.where(present, order, 0), present
