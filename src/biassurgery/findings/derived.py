"""The sites that a tally holds."""

from __future__ import annotations

import math
from itertools import groupby

from biassurgery.findings.births import Place, births
from biassurgery.findings.levels import Level, levels, lowered, widespread
from biassurgery.findings.site import Origin, Site, Span
from biassurgery.findings.tally import Tally

START = "start"
# tokens a sequence behind the start token, on average, below which a few delimiters may be most
_ENOUGH = 4


def derived_sites(tally: Tally, origin: Origin) -> list[Site]:
    """The sites of a tally, in order of layer, channel and role; uniform channels have none."""
    massive = list(levels(tally, len(origin.roles)))
    uniform = _uniform(massive, tally, origin)
    massive = [level for level in massive if _place(level) not in uniform]
    growths = tally.growths()
    born = None if growths is None else births(map(_place, massive), growths)
    sites = []
    for place, group in groupby(massive, _place):
        sites += _sites_at(place, list(group), born, origin.roles)
    return sites


def standing_places(tally: Tally, origin: Origin) -> dict[Place, float]:
    """Where the run without massive values had others that meet the definition, and no site is.

    Returns:
        The smallest magnitude at each (layer, channel); uniform channels are none of them.
    """
    known = {_place(level) for level in levels(tally, len(origin.roles))}
    return {
        (end, channel): least
        for (channel, start, end), least in (tally.growths() or {}).items()
        if start == end and (end, channel) not in known
    }


def uniform_places(tally: Tally, origin: Origin) -> set[Place]:
    """Channels (layer, channel) that are massive by magnitude, but at most of all tokens."""
    return _uniform(list(levels(tally, len(origin.roles))), tally, origin)


def _uniform(massive: list[Level], tally: Tally, origin: Origin) -> set[Place]:
    """Of text, the start tokens do not count: they may be most tokens, and massive at all."""
    if START not in origin.roles:
        return widespread(massive, tally.tokens)
    others = tally.tokens - tally.sequences
    if others < _ENOUGH * tally.sequences:
        return set()
    start = origin.roles.index(START)
    return widespread((level for level in massive if level.role != start), others)


def _place(level: Level) -> Place:
    return level.layer, level.channel


def _sites_at(
    place: Place, massive: list[Level], born: dict[Place, float] | None, roles: tuple[str, ...]
) -> list[Site]:
    """The sites of one channel of one block."""
    gate, margin = massive[0].gate, massive[0].margin
    least = min(min(abs(level.low), abs(level.high)) for level in massive)
    gate = lowered(gate, least, margin, (born or {}).get(place, math.inf))
    first = None if born is None else place in born
    spans = tuple(
        Span(roles[level.role], level.cluster, level.low, level.high) for level in massive
    )
    return [
        Site(
            *place,
            roles[level.role],
            level.mean,
            level.std,
            level.count,
            gate,
            margin,
            level.cluster,
            first,
            spans,
        )
        for level in massive
    ]
