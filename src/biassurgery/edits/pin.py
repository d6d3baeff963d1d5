"""The edits of `pin`: values written at tokens of a role, whatever stands there."""

from __future__ import annotations

import torch
from torch import Tensor

from biassurgery.edits.massive import check_holds
from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.block import BlockEdit
from biassurgery.surgery.starts import Starts


class PinEdit(BlockEdit):
    """Writes over channels of a block's output where `rows` says so.

    Static shapes, nothing read back to the host.

    Args:
        levels: of each role, in the order of the first positions, what is written into a channel;
            {} where nothing is.
    """

    channels: Tensor  # (C,) int64
    values: Tensor  # (R + 1, C) float32 of each role, NaN where nothing is written; all NaN at last

    def __init__(self, levels: list[dict[int, float]]) -> None:
        super().__init__()
        channels = sorted({channel for role in levels for channel in role})
        rows = [[role.get(channel, torch.nan) for channel in channels] for role in (*levels, {})]
        self.largest = max(abs(level) for role in levels for level in role.values())
        self.register_buffer("channels", torch.tensor(channels), persistent=False)
        self.register_buffer("values", torch.tensor(rows, dtype=torch.float32), persistent=False)

    def rows(self, hidden: Tensor) -> Tensor:
        """(T,) or (B, T) int64: the row of `values` for each token."""
        raise NotImplementedError  # abstract

    def forward(self, hidden: Tensor, start: int | Tensor = 0) -> Tensor:
        check_holds(hidden.dtype, self.largest)
        x = hidden.index_select(-1, self.channels)
        level = self.values[self.rows(hidden)]  # (T, C) or (B, T, C)
        new = torch.where(level.isnan(), x, level.to(x.dtype))
        return hidden.index_copy(-1, self.channels, new)


class PinPrefix(PinEdit):
    """At the first positions of every sequence, one a role: [CLS] and registers of an image."""

    def rows(self, hidden: Tensor) -> Tensor:
        last = len(self.values) - 1
        return torch.arange(hidden.shape[1], device=hidden.device).clamp(max=last)


class PinStart(PinEdit):
    """At the first token of every sequence of text.

    Args:
        levels: of the role `start`, by channel.
        starts: tells which tokens these are.
    """

    def __init__(self, levels: dict[int, float], starts: Starts) -> None:
        super().__init__([levels])
        self.starts = starts

    def rows(self, hidden: Tensor) -> Tensor:
        self.starts.check_anew()
        tokens = self.starts.tokens
        if tokens is None or tokens.shape != hidden.shape[:2]:
            shape = None if tokens is None else tuple(tokens.shape)
            raise UnsupportedModel(
                f"model: a block was run on {tuple(hidden.shape[:2])} tokens where the model was"
                f" given {shape}, so that the first of a sequence is not known; run the model as a"
                " whole, or unpatch 'pin'."
            )
        return (~tokens).long().to(hidden.device)
