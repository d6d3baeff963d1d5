"""A quantity of `record` and a statistic of `detect`, found by the entry points of the package."""

import torch

from biassurgery.extend import AttentionQuantity, Statistic


class Entropy(AttentionQuantity):
    """(B, H, T): how spread out each query's attention is, in nats."""

    name = "attention_entropy"

    def of(self, seen):
        p = seen.probs
        return -(p * p.clamp(min=1e-30).log()).sum(-1)


class Kurtosis(Statistic):
    """Fourth central moment over squared variance, of all values at real tokens of a layer."""

    name = "kurtosis"

    def see(self, output):
        values = output.hidden[output.real].double()
        self.totals.add(output.layer, torch.stack([(values**n).sum() for n in range(5)]))

    def result(self):
        return {layer: self.of_sums(*sums.tolist()) for layer, sums in self.totals.items()}

    @staticmethod
    def of_sums(n, a, b, c, d):
        m, b, c, d = a / n, b / n, c / n, d / n
        return (d - 4 * m * c + 6 * m**2 * b - 3 * m**4) / (b - m**2) ** 2
