"""Channels that are large at nearly all tokens, which are told apart from massive activations.

Sun et al. 2024, section 5 and figure 11: MAE ViT-L has no massive activations, but in it "a feature
dimension exhibits uniformly large values across all tokens" (channel 927).
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor

FAR = 10.0  # medians of the sequence's hidden state
NEARLY_ALL = 0.95  # of the tokens


@dataclass(frozen=True)
class UniformChannel:
    """A channel of a block's output whose magnitude is beyond 10 times the median of the hidden
    state at 95 % of the tokens or more.

    In images, also one whose massive values are on more than half of the tokens: massive
    activations are on few, so it has no sites.

    Attributes:
        layer, channel: 0-based.
        magnitude: mean over the tokens.
        ratio: that over the layer's median, a mean over sequences.
        share: of the tokens at which the magnitude is beyond 10 medians.
    """

    layer: int
    channel: int
    magnitude: float
    ratio: float
    share: float


class UniformStatistics:
    """For each layer how often a channel is far above the median, and the sum of its magnitudes:
    (2, D) float64, on its device.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def see(self, layer: int, magnitude: Tensor, median: Tensor) -> None:
        """Take one block's magnitudes (B, T, D), 0 at padding, and the medians (B,) of its
        sequences.
        """
        far = (magnitude > FAR * median[:, None, None]).sum((0, 1))
        sums = torch.stack([far.double(), magnitude.sum((0, 1), dtype=torch.float32).double()])
        self._sums[layer] = self._sums[layer] + sums if layer in self._sums else sums

    def result(
        self, tokens: int, medians: list[float], widespread: Container[tuple[int, int]]
    ) -> tuple[UniformChannel, ...]:
        """The uniform channels, with those that are known to be (layer, channel); `medians` of each
        layer.
        """
        found = []
        for layer, median in enumerate(medians):
            shares, means = (self._sums[layer] / tokens).tolist()
            for channel, (share, mean) in enumerate(zip(shares, means)):
                if share >= NEARLY_ALL or (layer, channel) in widespread:
                    found.append(
                        UniformChannel(
                            layer, channel, mean, mean / median if median else float("inf"), share
                        )
                    )
        return tuple(found)
