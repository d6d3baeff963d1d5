"""The edits of `pin`: values written at tokens of a role, whatever stands there."""

from __future__ import annotations

import torch
from torch import Tensor

from biassurgery.edits.massive import check_holds
from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.block import BlockEdit
from biassurgery.surgery.starts import Starts


class PinEdit(BlockEdit):
    """Writes over channels of a block's output at tokens that a subclass tells.

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

    def forward(self, hidden: Tensor, start: int | Tensor = 0) -> Tensor:
        check_holds(hidden.dtype, self.largest)
        new = self.written(hidden.index_select(-1, self.channels))
        return hidden.index_copy(-1, self.channels, new)

    def written(self, x: Tensor) -> Tensor:
        """What becomes of the channels (B, T, C)."""
        raise NotImplementedError  # abstract


class PinPrefix(PinEdit):
    """At the first positions of every sequence, one a role: [CLS] and registers of an image."""

    def written(self, x: Tensor) -> Tensor:
        last = len(self.values) - 1
        level = self.values[torch.arange(x.shape[1], device=x.device).clamp(max=last)]  # (T, C)
        return torch.where(level.isnan(), x, level.to(x.dtype))


class PinStart(PinEdit):
    """At the first token of every sequence of text.

    Args:
        levels: of the role `start`, by channel.
        starts: tells which tokens these are.
    """

    def __init__(self, levels: dict[int, float], starts: Starts) -> None:
        super().__init__([levels])
        self.starts = starts

    def forward(self, hidden: Tensor, start: int | Tensor = 0) -> Tensor:
        self._check_tokens(hidden)
        return super().forward(hidden, start) if self.starts.begins else hidden

    def _check_tokens(self, hidden: Tensor) -> None:
        self.starts.check_anew()
        tokens = self.starts.tokens
        if tokens is None or tokens.shape != hidden.shape[:2]:
            shape = None if tokens is None else tuple(tokens.shape)
            raise UnsupportedModel(
                f"model: a block was run on {tuple(hidden.shape[:2])} tokens where the model was"
                f" given {shape}, so that the first of a sequence is not known; run the model as a"
                " whole, or unpatch 'pin'."
            )

    def written(self, x: Tensor) -> Tensor:
        tokens = self.starts.tokens
        assert tokens is not None  # they were checked
        return torch.where(tokens.to(x.device)[..., None], self.values[0].to(x.dtype), x)
