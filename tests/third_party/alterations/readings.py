"""A quantity of `record`, a statistic of `detect`; found by the entry point in pyproject.toml."""

import torch

from biassurgery.extend import AttentionQuantity, Statistic


class Entropy(AttentionQuantity):
    name = "row_entropy"

    def of(self, seen):
        return torch.special.entr(seen.probs).sum(-1)


class Energy(Statistic):
    """The mean square of the residual stream at the output of each block, over real tokens."""

    name = "energy"

    def see(self, output):
        values = output.hidden[output.real].double()
        numbers = (values.square().sum(), torch.tensor(float(values.numel())))
        self.totals.add(output.layer, torch.stack(numbers))

    def result(self):
        sums = sorted(self.totals.items())
        return {layer: (squares / count).item() for layer, (squares, count) in sums}
