"""Where massive values are born, and where they have grown: what `layers="first"` means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from biassurgery.findings.site import Site

Place = tuple[int, int]  # layer, channel


def births(
    places: Iterable[Place], growths: Mapping[tuple[int, int, int], float]
) -> dict[Place, float]:
    """The places that are to be changed so that nothing massive is left, and what is left at them.

    Of each channel, its first block and every one at which a value has grown by more than the
    definition since the last of these.

    Args:
        places: (layer, channel) with massive values.
        growths: of (channel, from, to), see `Tally.grown`.

    Returns:
        The smallest growth at each of them; infinity where there is none.
    """
    chosen: dict[Place, float] = {}
    last: dict[int, int] = {}  # the latest block of each channel
    for layer, channel in sorted(places):
        since = (channel, last.get(channel, layer), layer)
        growth = min(growths.get(since, math.inf), growths.get((channel, layer, layer), math.inf))
        if channel not in last or growth < math.inf:
            chosen[layer, channel] = growth
            last[channel] = layer
    return chosen


def first_places(sites: Sequence[Site]) -> set[Place]:
    """The places (layer, channel) that `layers="first"` changes.

    Of each channel, the first block that these sites have, and those at which values have grown.
    `calibrate` has measured that. Where it is not known (sites made by hand, published, or in files
    of versions before), a mean has if it is further from all means of its role at the last of these
    blocks than the gate, by which a patch would take what is left for massive.
    """
    by_place: dict[Place, list[Site]] = {}
    for site in sites:
        by_place.setdefault((site.layer, site.channel), []).append(site)
    chosen: set[Place] = set()
    last: dict[int, list[Site]] = {}
    for (layer, channel), here in sorted(by_place.items()):
        before = last.get(channel)
        if before is None or any(_has_grown(site, here, before) for site in here):
            chosen.add((layer, channel))
            last[channel] = here
    return chosen


def gate_of(sites: Iterable[Site]) -> float:
    """Magnitude beyond which a value of the channel of these sites is massive.

    Without a measured gate, half the smallest level.
    """
    return min(abs(site.mean) / 2 if site.gate is None else site.gate for site in sites)


def _has_grown(site: Site, here: Sequence[Site], before: Sequence[Site]) -> bool:
    if site.first is not None:
        return site.first
    gate = gate_of(here)
    return all(abs(site.mean - old.mean) > gate for old in before if old.role == site.role)
