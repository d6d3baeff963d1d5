"""Channels that are large at nearly all tokens, which are told apart from massive activations.

Sun et al. 2024, section 5 and figure 11: MAE ViT-L has no massive activations, but in it "a feature
dimension exhibits uniformly large values across all tokens" (channel 927).
"""

from __future__ import annotations

from collections.abc import Container

import torch

from biassurgery.findings.detection import UniformChannel
from biassurgery.measure.statistic import BlockOutput, Statistic

FAR = 10.0  # medians of the sequence's hidden state
NEARLY_ALL = 0.95  # of the tokens


class UniformChannels(Statistic):
    """For each layer (2, D) float64: at how many tokens a channel is uniform, and its magnitudes.

    Uniform is far above the median; the magnitudes are a sum over tokens.
    """

    name = "uniform_channels"
    in_batch = ()

    def see(self, output: BlockOutput) -> None:
        magnitude = output.magnitude
        far = (magnitude > FAR * output.median[:, None, None]).sum((0, 1))
        sums = magnitude.sum((0, 1), dtype=torch.float32)
        self.totals.add(output.layer, torch.stack([far.double(), sums.double()]))
        self.totals.add(("median", output.layer), output.median.double().sum())
        if output.layer == 0:
            self.totals.add("tokens", int(output.real.sum()))
            self.totals.add("sequences", int(output.real.any(1).sum()))

    def result(
        self, widespread: Container[tuple[int, int]] = frozenset()
    ) -> tuple[UniformChannel, ...]:
        """The uniform channels, with those (layer, channel) that are known to be."""
        uniform = []
        for layer in range(len(self.host.blocks)):
            if layer not in self.totals:  # it did not run
                continue
            median = float(self.totals["median", layer] / self.totals["sequences"])
            shares, means = (self.totals[layer] / self.totals["tokens"]).tolist()
            for channel, (share, mean) in enumerate(zip(shares, means)):
                if share >= NEARLY_ALL or (layer, channel) in widespread:
                    ratio = mean / median if median else float("inf")
                    uniform.append(UniformChannel(layer, channel, mean, ratio, share))
        return tuple(uniform)
