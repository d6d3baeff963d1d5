"""The edit of `fix_registers`: what the register tokens are when a block reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from biassurgery.edits.massive import check_holds
from biassurgery.errors import BatchTooSmall
from biassurgery.surgery.alike import alike
from biassurgery.surgery.block import BlockEdit


class RegisterEdit(BlockEdit):
    """Writes over chosen tokens of a block's input: static shapes, nothing read back to the host.

    Args:
        positions: of the tokens.
        mean: (tokens, D) float32, what they become.
        std: of the same shape, standard deviation of normal noise around it, drawn for each image;
            None: none.
    """

    at = "input"
    positional = True
    positions: Tensor  # (N,) int64
    mean: Tensor
    std: Tensor | None

    def __init__(self, positions: list[int], mean: Tensor, std: Tensor | None = None) -> None:
        super().__init__()
        self.largest = mean.abs().max().item()
        self.register_buffer("positions", torch.tensor(positions), persistent=False)
        self.register_buffer("mean", mean.float().clone(), persistent=False)
        self.register_buffer("std", None if std is None else std.float().clone(), persistent=False)

    def new(self, hidden: Tensor) -> Tensor:
        """(B, N, D) or (N, D): what the tokens become."""
        if self.std is None:
            return self.mean
        noise = torch.randn(hidden.shape[0], *self.mean.shape, device=hidden.device)
        return self.mean + self.std * alike(noise, self.mesh)

    def forward(self, hidden: Tensor, start: int | Tensor = 0) -> Tensor:
        check_holds(hidden.dtype, self.largest)
        new = self.new(hidden).to(hidden.dtype)
        return hidden.index_copy(1, self.positions, new.expand(hidden.shape[0], -1, -1))


class ShuffledRegisters(RegisterEdit):
    """Gives each image the tokens of another one of the batch."""

    def new(self, hidden: Tensor) -> Tensor:
        rows = hidden.shape[0]  # which torch.export leaves open, unlike len()
        if rows < 2:
            raise BatchTooSmall(
                f"fill: 'shuffle' takes registers of other images, but the batch has {rows}; run at"
                " least two together."
            )
        # By 1 to n - 1 places: no image keeps its own.
        draw = alike(torch.rand((), device=hidden.device), self.mesh)
        step = 1 + (draw * (rows - 1)).long()
        donor = (torch.arange(rows, device=hidden.device) + step) % rows
        return hidden.index_select(1, self.positions).index_select(0, donor)
