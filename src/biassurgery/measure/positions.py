"""Where in the sequence massive values are, and where in an image that is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from biassurgery.adapters.image import ImageAdapter
from biassurgery.adapters.registry import Host
from biassurgery.data.transforms import patch_kernel
from biassurgery.findings.detection import PositionSummary
from biassurgery.findings.grid import Grid, grid_of_batch, place_of, prefix_of
from biassurgery.findings.tally import role_of
from biassurgery.measure.candidates import Candidates
from biassurgery.measure.statistic import BlockOutput, Statistic


class Positions(Statistic):
    """How many tokens at each (layer, position) hold values of which keys that may be massive.

    A token may hold several, one a channel; so both values and tokens can be counted from it.

    Args:
        host: the model.
        candidates: tells which.
    """

    name = "positions"
    in_batch = ()

    def __init__(self, host: Host, candidates: Candidates) -> None:
        super().__init__(host)
        self.candidates = candidates
        self.totals = Counter[tuple[int, int, tuple[int, ...]]]()

    def see(self, output: BlockOutput) -> None:
        found = self.candidates.of(output)
        keys: dict[tuple[int, int], list[int]] = {}
        for row, position, key in zip(*(part.tolist() for part in found)):
            keys.setdefault((row, position), []).append(key)
        for (_, position), held in keys.items():
            self.totals[output.layer, position, tuple(sorted(held))] += 1

    def __add__(self, other: Statistic) -> Positions:
        assert isinstance(other, Positions)
        both = super().__add__(other)
        assert isinstance(both, Positions)
        both.candidates = self.candidates + other.candidates
        return both

    def result(self, grid: Grid | None = None) -> tuple[PositionSummary, ...]:
        """Massive values at each position, and the tokens that hold them; most frequent first.

        Args:
            grid: of the patches of all images.
        """
        counts = Counter[tuple[int, int]]()
        tokens = Counter[tuple[int, int]]()
        for layer, position, massive, count in self._massive():
            counts[layer, position] += count * len(massive)
            tokens[layer, position] += count
        order = sorted(counts.items(), key=lambda item: (item[0][0], -item[1], item[0][1]))
        return tuple(
            PositionSummary(
                layer, position, count, *self._place(position, grid), tokens[layer, position]
            )
            for (layer, position), count in order
        )

    def tokens_by_role(self) -> Counter[tuple[int, str]]:
        """How many tokens of a role hold massive values, by (layer, role)."""
        tokens = Counter[tuple[int, str]]()
        for layer, _, massive, count in self._massive():
            role = role_of(massive[0], len(self.host.roles))
            tokens[layer, self.host.roles[role]] += count
        return tokens

    def _massive(self) -> Iterator[tuple[int, int, list[int], int]]:
        """Layer, position, the keys of its massive values, and how many tokens are like that."""
        massive = self.candidates.massive.massive_keys()
        for (layer, position, held), count in self.totals.items():
            chosen = [key for key in held if key in massive]
            if chosen:
                yield layer, position, chosen, count

    def _place(self, position: int, grid: Grid | None) -> tuple[str | None, tuple[int, int] | None]:
        if self.host.adapter.modality != "image":
            return None, None
        return place_of(position, self.host.roles, grid)


class PatchGrid(Statistic):
    """How many batches had which grid of patches; None: one that is not known."""

    name = "grid"
    in_batch = ()

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.totals = Counter[Grid | None]()

    def begin(self, batch: Mapping[str, Any]) -> None:
        self._batch = batch

    def see(self, output: BlockOutput) -> None:
        if output.layer == 0 and self.host.adapter.modality == "image":
            tokens = output.hidden.shape[1] - self.host.adapter.behind(self.host.model)
            self.totals[self._grid(tokens)] += 1

    def _grid(self, tokens: int) -> Grid | None:
        adapter = self.host.adapter
        if isinstance(adapter, ImageAdapter):
            patches = tokens - prefix_of(self.host.roles)
            known = adapter.patch_grid(self.host.model, self._batch, patches)
            if known is not None:
                return known
        kernel = patch_kernel(self.host.model)
        return grid_of_batch(self._batch, self.host.roles, tokens, kernel)

    def result(self) -> Grid | None:
        """The grid of all images, if it is one."""
        return next(iter(self.totals)) if len(self.totals) == 1 else None
