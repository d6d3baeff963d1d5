"""A decoder that looks like no other: its layers are in a dict, its argument is called `words`, and
it knows nothing of biassurgery.
"""

import torch
from torch import Tensor, nn

WIDTH = 32
VOCAB = 50
CHANNEL = 5


class Layer(nn.Module):
    """Causal mean of the tokens so far, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> tuple[Tensor, str]:
        normed = self.norm(hidden)
        count = torch.arange(1, hidden.shape[1] + 1)[:, None]
        return hidden + torch.tanh(self.mix(normed.cumsum(1) / count)), "nothing else"


class Oddformer(nn.Module):
    """Three layers; token 0 has a massive activation in channel 5 from the first on."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.stack = nn.ModuleDict({"bottom": Layer(), "middle": Layer(), "top": Layer()})
        self.head = nn.Linear(WIDTH, VOCAB)
        with torch.no_grad():
            self.embedding.weight[0, CHANNEL] = 4000.0

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.embedding(words)
        for layer in self.stack.values():
            hidden, _ = layer(hidden)
        return self.head(hidden)
