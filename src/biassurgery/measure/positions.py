"""Where in the sequence massive values are, and where in an image that is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from typing import Any

from biassurgery.adapters.registry import Host
from biassurgery.data.transforms import patch_kernel
from biassurgery.findings.detection import PositionSummary
from biassurgery.findings.grid import Grid, grid_of_batch, place_of
from biassurgery.measure.statistic import BlockOutput, Statistic


class Positions(Statistic):
    """How many values at each (layer, channel, position) are massive."""

    name = "positions"

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.totals = Counter[tuple[int, int, int]]()

    def see(self, output: BlockOutput) -> None:
        channels, massive = output.massive
        counts = massive.sum(0)  # (T, C)
        token, column = counts.nonzero(as_tuple=True)
        rows = zip(channels[column].tolist(), token.tolist(), counts[token, column].tolist())
        for channel, position, count in rows:
            self.totals[output.layer, channel, position] += count

    def result(
        self, left_out: Container[tuple[int, int]] = frozenset(), grid: Grid | None = None
    ) -> tuple[PositionSummary, ...]:
        """Values at each position, the most frequent of a layer first.

        Args:
            left_out: channels (layer, channel) that do not count.
            grid: of the patches of all images.
        """
        counts = Counter[tuple[int, int]]()
        for (layer, channel, position), count in self.totals.items():
            if (layer, channel) not in left_out:
                counts[layer, position] += count
        order = sorted(counts.items(), key=lambda item: (item[0][0], -item[1], item[0][1]))
        return tuple(
            PositionSummary(layer, position, count, *self._place(position, grid))
            for (layer, position), count in order
        )

    def _place(self, position: int, grid: Grid | None) -> tuple[str | None, tuple[int, int] | None]:
        if self.host.adapter.modality != "image":
            return None, None
        return place_of(position, self.host.roles, grid)


class PatchGrid(Statistic):
    """How many batches had which grid of patches; None: one that is not known."""

    name = "grid"

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.totals = Counter[Grid | None]()

    def begin(self, batch: Mapping[str, Any]) -> None:
        self._batch = batch

    def see(self, output: BlockOutput) -> None:
        if output.layer == 0 and self.host.adapter.modality == "image":
            tokens = output.hidden.shape[1]
            kernel = patch_kernel(self.host.model)
            self.totals[grid_of_batch(self._batch, self.host.roles, tokens, kernel)] += 1

    def result(self) -> Grid | None:
        """The grid of all images, if it is one."""
        return next(iter(self.totals)) if len(self.totals) == 1 else None
