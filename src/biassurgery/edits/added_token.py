"""The edits of `test_time_registers`: an added token, and neurons that are active at it alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from biassurgery.surgery.block import BlockEdit
from biassurgery.surgery.edit import Edit
from biassurgery.surgery.linear import InputEdit
from biassurgery.surgery.swap import Swapped


class AddToken(BlockEdit):
    """Puts a token of zeros into what a block reads, at `position`."""

    at = "input"
    adds = 1

    def __init__(self, position: int) -> None:
        super().__init__()
        self.position = position

    def forward(self, hidden: Tensor, start: int | Tensor = 0) -> Tensor:
        zeros = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[-1])
        return torch.cat([hidden[:, : self.position], zeros, hidden[:, self.position :]], 1)


class DropToken(BlockEdit):
    """Takes the token at `position` out of what leaves a block.

    All other edits and observers of the block still see it.
    """

    at = "exit"

    def __init__(self, position: int) -> None:
        super().__init__()
        self.position = position

    def forward(self, hidden: Tensor, start: int | Tensor = 0) -> Tensor:
        return torch.cat([hidden[:, : self.position], hidden[:, self.position + 1 :]], 1)


class CountsOneMore(Swapped):
    """Mixed in front of a module that knows by `num_prefix_tokens` where the patches begin."""

    host_prefix_tokens: int
    lent = ("host_prefix_tokens",)

    @classmethod
    def lend(cls, module: nn.Module) -> dict[str, Any]:
        return {"host_prefix_tokens": module.num_prefix_tokens}

    @property
    def num_prefix_tokens(self) -> int:
        return self.host_prefix_tokens + 1


class CountToken(Edit):
    """Lets a module count one prefix token more: rotary attention leaves so many as they are.

    The module's own attribute stays; a property of the class goes before it.
    """

    child = "token_count"
    mixin = CountsOneMore


class NeuronEdit(InputEdit):
    """Moves the activation of register neurons to one token.

    There it becomes the largest of the image, at all others 0.

    The largest by magnitude, with its sign, over all tokens of the image, the added one included.
    Static shapes, nothing read back to the host. Source: Jiang et al. 2025, appendix A.3, algorithm
    2, which takes the maximum: the same for neurons that cannot be large and negative (ReLU, GELU);
    those of gated MLPs can.

    Args:
        neurons: inputs of the linear layer.
        position: of the token.
    """

    child = "register_neurons"
    several = False
    neurons: Tensor  # (N,) int64

    def __init__(self, neurons: list[int], position: int) -> None:
        super().__init__()
        self.position = position
        self.register_buffer("neurons", torch.tensor(neurons), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        active = x.index_select(-1, self.neurons)
        low = active.amin(-2, keepdim=True)
        high = active.amax(-2, keepdim=True)
        largest = torch.where(high >= -low, high, low)
        alone = pad(largest, (0, 0, self.position, x.shape[-2] - self.position - 1))
        return x.index_copy(-1, self.neurons, alone)
