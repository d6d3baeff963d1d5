"""Linear layers as int8 would have them: rounded, but computed in floating point."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from biassurgery.surgery.linear import Replacement

Activations = Literal["exact", "static", "tensor", "token"]
_LEVELS = 127  # of int8, symmetric
_LEAST = 1e-12


class FakeQuantised(Replacement):
    """A linear layer with integer weights, one scale an output, and int8 inputs.

    Args:
        weights: (N, D) of the layer, which stays as it is.
        bias: (N,); None: it has none.
        activations: how the inputs are scaled: not at all; by one number for all data; by one for
            all tokens of a forward; by one a token.
        largest: the magnitude that a static scale reaches to; values beyond it clip.
        bits: of the weights.
        group: so many inputs in a row share a scale of an output's weights; None: all do.
        factors: (D,) that the inputs are multiplied by, and the weights divided, before both are
            rounded; None: 1.
    """

    weights: Tensor

    def __init__(
        self,
        weights: Tensor,
        bias: Tensor | None,
        activations: Activations,
        largest: float | None = None,
        bits: int = 8,
        group: int | None = None,
        factors: Tensor | None = None,
    ) -> None:
        super().__init__()
        if factors is not None:
            weights = weights / factors
        groups = weights.reshape(-1, group or weights.shape[1])
        rounded = by_row(groups, 2 ** (bits - 1) - 1).view_as(weights)
        self.register_buffer("weights", rounded, persistent=False)
        self.factors = factors
        self.bias = None if bias is None else bias.detach()
        self.activations = activations
        self.largest = largest

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float() if self.factors is None else x.float() * self.factors
        read = self._read(x32)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(read, self.weights, bias).to(x.dtype)

    def _read(self, x: Tensor) -> Tensor:
        if self.activations == "exact":
            return x
        if self.activations == "token":
            return by_row(x.flatten(0, -2)).view_as(x)
        largest = self.largest if self.activations == "static" else x.abs().max().item()
        assert largest is not None  # a static scale has it
        scale = max(largest, _LEAST) / _LEVELS
        return torch.fake_quantize_per_tensor_affine(x, scale, 0, -_LEVELS, _LEVELS)


def by_row(x: Tensor, levels: int = _LEVELS) -> Tensor:
    """(N, D) rounded to so many levels of the largest magnitude in its row."""
    scale = x.abs().amax(1).clamp(min=_LEAST) / levels
    zeros = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    return torch.fake_quantize_per_channel_affine(x, scale, zeros, 0, -levels, levels)
