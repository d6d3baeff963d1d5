"""From a tally to the massive values of every channel: gate, margin, and levels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

from biassurgery.findings.tally import BINS, Tally

# values of a role that no value bridges over this factor are levels of their own
CLUSTER_RATIO = 1.5
# a gate stays within this factor of the smallest massive value, for others have a tail that
# calibration did not see
_NEAREST = 4.0
_JUST_BELOW = 1 - 2**-20  # smaller also after rounding to float32
# of the tokens: massive activations are on few, so a channel with more massive values is uniformly
# large
MOST = 0.5


@dataclass(frozen=True)
class Level:
    """One cluster of massive values of a channel and role."""

    layer: int
    channel: int
    role: int
    cluster: int
    mean: float
    std: float
    count: int
    gate: float
    margin: float
    low: float
    high: float


def massive_keys(tally: Tally, roles: int, left_out: Container[tuple[int, int]]) -> set[int]:
    """The keys of the values beyond the gates of their channels, some channels left out."""
    gates = {(level.layer, level.channel): level.gate for level in levels(tally, roles)}
    keys = set()
    for key, low in zip(tally.keys.tolist(), tally.low.tolist()):
        place = tally.place(key, roles)
        if place in gates and place not in left_out and low > gates[place]:
            keys.add(key)
    return keys


@dataclass(frozen=True)
class _Bin:
    role: int
    negative: bool
    count: float
    mean: float
    deviation: float
    low: float
    high: float
    hit: float


def levels(tally: Tally, roles: int) -> Iterator[Level]:
    """The massive values of every channel with a hit, in order of layer, channel, role."""
    channels: dict[tuple[int, int], list[_Bin]] = {}
    rows = zip(*(getattr(tally, name).tolist() for name in tally.ROWS))
    for key, count, mean, deviation, low, high, hit in rows:
        rest, negative = divmod(key // BINS, 2)
        place, role = divmod(rest, roles)
        channels.setdefault(divmod(place, tally.width), []).append(
            _Bin(role, bool(negative), count, mean, deviation, low, high, hit)
        )
    for (layer, channel), bins in sorted(channels.items()):
        if all(math.isinf(b.hit) for b in bins):
            continue
        gate, margin = _widest_gap(bins, tally.below[layer, channel].item())
        for role in range(roles):
            massive = sorted(
                (b for b in bins if b.role == role and b.low > gate), key=lambda b: b.mean
            )
            for cluster, group in enumerate(_clusters(massive)):
                count = sum(b.count for b in group)
                mean = sum(b.count * b.mean for b in group) / count
                deviation = sum(b.deviation + b.count * (b.mean - mean) ** 2 for b in group)
                least, most = _span(group)
                yield Level(
                    layer,
                    channel,
                    role,
                    cluster,
                    mean,
                    math.sqrt(deviation / count),
                    int(count),
                    gate,
                    margin,
                    *((-most, -least) if group[0].negative else (least, most)),
                )


def widespread(massive: Iterable[Level], tokens: int) -> set[tuple[int, int]]:
    """The channels (layer, channel) whose massive values are on most of the tokens."""
    counts = Counter[tuple[int, int]]()
    for level in massive:
        counts[level.layer, level.channel] += level.count
    return {place for place, count in counts.items() if count > MOST * tokens}


def lowered(gate: float, least: float, margin: float, growth: float) -> float:
    """A gate that also catches what a value has grown by, where that can be told from others.

    Args:
        gate: of the channel, for values as they are without a patch.
        least: the smallest massive magnitude of the channel.
        margin: that over the largest other magnitude.
        growth: the smallest magnitude that a patch at an earlier block leaves here; infinity: none.
    """
    largest_other = least / margin
    if not largest_other < growth < math.inf:
        return gate
    return min(gate, max(math.sqrt(largest_other * growth), growth / _NEAREST))


def _widest_gap(bins: list[_Bin], below: float) -> tuple[float, float]:
    """(gate, margin) under the smallest value that met the definition.

    The gate is a number inside the widest gap there, on a log scale, the margin how wide that gap
    is. `below` is the largest magnitude that no bin holds. With 10 below, bins of magnitudes 12 to
    20 and 900 to 1000, and a smallest hit of 900, the gaps are 12 / 10 and 900 / 20 = 45. The gate
    is the geometric middle of the wider, sqrt(20 x 900) = 134, but at least 900 / 4 = 225.
    """
    smallest_hit = min(b.hit for b in bins)
    gaps = []
    previous = below
    for b in sorted(bins, key=lambda b: b.low):
        # Behind the smallest value that met the definition no gap matters: what is there is massive
        # whatever the gate.
        if b.low <= smallest_hit:
            gaps.append((b.low / previous if previous else math.inf, previous, b.low))
            previous = max(previous, b.high)
    if not below:  # nothing smaller was seen, so only a gap that parts clusters divides what was
        gaps = [gap for gap in gaps[1:] if gap[0] >= CLUSTER_RATIO] or gaps[:1]
    margin, largest_other, smallest = max(gaps)
    if margin <= 1:  # no gap: other values reach above the smallest one that met the definition
        smallest = next(b.low for b in bins if b.hit == smallest_hit)
        return smallest * _JUST_BELOW, smallest / previous
    return max(math.sqrt(largest_other * smallest), smallest / _NEAREST), margin


def _clusters(bins: list[_Bin]) -> list[list[_Bin]]:
    """Bins of one role, in order of value, in groups that are separate.

    They are if they have other signs, or a gap between them is wider than either is itself. The
    second condition keeps the tail of a broad distribution with it: a gap in a few scattered values
    is no level of its own. Magnitudes 100 to 110 | 300 to 320 are two groups, for the gap of 300 /
    110 = 2.7 is wider than either; 100 to 400 | 700 are one, for 1.75 is less than 4.
    """
    groups: list[list[_Bin]] = []
    for b in bins:
        # A new bin may bridge what was separate, so groups are joined as long as they can be.
        groups.append([b])
        while len(groups) > 1 and not _separate(groups[-2], groups[-1]):
            last = groups.pop()
            groups[-1].extend(last)
    return groups


def _separate(a: list[_Bin], b: list[_Bin]) -> bool:
    if a[0].negative != b[0].negative:
        return True
    near, far = sorted((_span(a), _span(b)))
    gap = far[0] / near[1]
    return gap >= CLUSTER_RATIO and gap > max(near[1] / near[0], far[1] / far[0])


def _span(bins: list[_Bin]) -> tuple[float, float]:
    """Smallest and largest magnitude."""
    return min(b.low for b in bins), max(b.high for b in bins)
