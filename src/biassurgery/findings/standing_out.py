"""The channel that stands out most where nothing meets the definition of a massive activation."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from biassurgery.findings.levels import MOST
from biassurgery.findings.sites import Sites
from biassurgery.findings.tally import BINS

_MEDIANS = 30.0  # times the median, from which on a channel stands out
_SEQUENCES = 0.5  # of the sequences have it


@dataclass(frozen=True)
class StandingOut:
    """A channel that is large at few tokens of most sequences, but not by the definition.

    Attributes:
        layer, channel: 0-based.
        role: of the tokens.
        mean: of its large values.
        median: magnitude of the layer's hidden states, mean over sequences.
        count: how many such values there are.
    """

    layer: int
    channel: int
    role: str
    mean: float
    median: float
    count: int

    @property
    def ratio(self) -> float:
        """Its magnitude over the median."""
        return abs(self.mean) / self.median

    @property
    def definition(self) -> tuple[float, float]:
        """A magnitude and a ratio that it is well above, for `min_magnitude` and `min_ratio`."""
        return _rounded(abs(self.mean) / 2), _rounded(self.ratio / 2)


def standing_out(sites: Sites) -> StandingOut | None:
    """The channel that is furthest above the median, of those that stand out; None: none does.

    It is looked for among the large values that a calibration keeps, which are those of about 30
    medians and more.

    Args:
        sites: of `calibrate` or `detect`; None is returned where there are any.
    """
    tally = sites.tally
    if len(sites) or tally is None:
        return None
    totals = defaultdict[tuple[int, int], list[float]](lambda: [0.0, 0.0])
    for key, count, mean in zip(tally.keys.tolist(), tally.count.tolist(), tally.mean.tolist()):
        place, negative = divmod(key // BINS, 2)
        totals[place, negative][0] += count
        totals[place, negative][1] += count * mean
    roles = sites.origin.roles
    medians = (tally.medians / max(tally.sequences, 1)).tolist()
    found = []
    for (place, _), (count, total) in totals.items():
        at, role = divmod(place, len(roles))
        layer, channel = divmod(at, tally.width)
        few = _SEQUENCES * tally.sequences <= count <= MOST * tally.tokens
        if few and medians[layer]:
            one = StandingOut(
                layer, channel, roles[role], total / count, medians[layer], int(count)
            )
            found.append(one)
    best = max(found, key=lambda one: one.ratio, default=None)
    return best if best is not None and best.ratio >= _MEDIANS else None


def _rounded(value: float) -> float:
    """A number rounded down to one significant digit."""
    unit = 10.0 ** math.floor(math.log10(value))
    return math.floor(value / unit) * unit
