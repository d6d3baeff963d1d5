"""A model that no adapter of the library knows, and an adapter for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import biassurgery as bs


class Twice(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * 2


class Unheard(nn.Module):
    """A decoder of the plainest kind, which no adapter knows; token 0 is massive in channel 3."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.hidden_size = 16
        self.embedding = nn.Embedding(20, 16)
        self.layers = nn.ModuleList(Twice() for _ in range(layers))
        with torch.no_grad():
            self.embedding.weight[0, 3] = 5000.0

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class UnheardAdapter(bs.extend.TextAdapter):
    family = "unheard"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, Unheard)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.layers)  # type: ignore[arg-type]

    def width(self, model: nn.Module) -> int:
        return model.hidden_size  # type: ignore[return-value]
