"""Outlier features (Dettmers et al. 2022), which are not the same as massive activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from biassurgery.measure.statistic import BlockOutput, Statistic

# Dettmers et al. 2022, as used by Sun et al. 2024, section 2
MAGNITUDE = 6.0
LAYERS = 0.25
TOKENS = 0.06
SEQUENCES = 0.90


class OutlierFeatures(Statistic):
    """For each channel on how many sequences it has outlier features, (D,).

    It has them on a sequence with a magnitude above 6.0 in more than 25 % of layers and, there, at
    more than 6 % of tokens; a channel counts if that is so on more than 90 % of sequences.
    """

    name = "outlier_features"
    in_batch = ("_layers", "_ran")

    def begin(self, batch: Mapping[str, Any]) -> None:
        # (B, D) how many layers have enough tokens above so far, wherever new tensors go by default
        self._layers = torch.zeros((), dtype=torch.int32, device="cpu")
        self._ran = 0

    def see(self, output: BlockOutput) -> None:
        tokens = output.real.sum(1, keepdim=True)
        above = (output.magnitude > MAGNITUDE).sum(1) > TOKENS * tokens
        self._layers = self._layers + above.int().cpu()
        self._ran += 1
        if output.layer == 0:
            self.totals.add("sequences", int((tokens > 0).sum()))

    def end(self) -> None:
        qualified = self._layers > LAYERS * self._ran
        self.totals.add("on", qualified.sum(0))

    def result(self) -> tuple[int, ...]:
        """The channels, in ascending order."""
        enough = self.totals["on"] > SEQUENCES * self.totals["sequences"]
        return tuple(enough.nonzero()[:, 0].tolist())
