"""How large the values of each layer are."""

from __future__ import annotations

import torch
from torch import nn

from biassurgery.findings.detection import LayerSummary
from biassurgery.measure.statistic import BlockOutput, Statistic

_TOP = 3


class Magnitudes(Statistic):
    """For each layer (4,) float64: top three magnitudes and median, summed over sequences."""

    name = "magnitudes"
    in_batch = ()

    def see(self, output: BlockOutput) -> None:
        flat = output.magnitude.flatten(1)
        top = flat.topk(min(_TOP, flat.shape[1])).values.double().sum(0)
        top = nn.functional.pad(top, (0, _TOP - len(top)))
        self.totals.add(output.layer, torch.cat([top, output.median.double().sum()[None]]))
        if output.layer == 0:
            self.totals.add("sequences", int(output.real.any(1).sum()))

    def result(self) -> tuple[LayerSummary, ...]:
        layers = []
        for layer in range(len(self.host.blocks)):
            if layer not in self.totals:  # it did not run
                continue
            first, second, third, median = (self.totals[layer] / self.totals["sequences"]).tolist()
            layers.append(LayerSummary(layer, (first, second, third), median))
        return tuple(layers)
