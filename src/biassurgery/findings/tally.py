"""What calibration remembers: a sparse table of large values per layer, channel and role.

Its size does not grow with the data. A channel's large values are kept as a histogram on a log
scale (16 bins an octave, signs apart) in which every bin knows its exact count, mean, squared
deviation, smallest and largest magnitude. Two tallies add up to exactly the tally of both data
sets, and everything that a `Site` says is derived from it at the end, so that the data are read
once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_BINS_PER_OCTAVE = 16
_BINS = 1 << 14  # covers every exponent of a float32, from 2^-512 to 2^512
# values of a role that no value bridges over this factor are levels of their own
CLUSTER_RATIO = 1.5
# a gate stays within this factor of the smallest massive value, for others have a tail that
# calibration did not see
_NEAREST = 4.0
_JUST_BELOW = 1 - 2**-20  # smaller also after rounding to float32
# of the tokens of images: massive activations are on few, so a channel with more massive values is
# uniformly large
MOST = 0.5


@dataclass(frozen=True)
class Tally:
    """Large values seen so far, one row a (layer, channel, role, sign, bin) that occurred.

    Attributes:
        keys: (R,) int64, the five indices in one number.
        count, mean, deviation: (R,) float64: values in the bin, their mean, sum of squared
            deviations from it.
        low, high: (R,) float64, smallest and largest magnitude in the bin.
        hit: (R,) float64, smallest magnitude in the bin that met the definition (infinity if none
            did).
        below: (layers, channels) float32, the largest magnitude under the table's floor; 0 if there
            was none.
        medians: (layers,) float64, sum over sequences of the median magnitude.
        sequences, tokens: how many were read.
    """

    keys: Tensor
    count: Tensor
    mean: Tensor
    deviation: Tensor
    low: Tensor
    high: Tensor
    hit: Tensor
    below: Tensor
    medians: Tensor
    sequences: int = 0
    tokens: int = 0

    ROWS = ("keys", "count", "mean", "deviation", "low", "high", "hit")

    @classmethod
    def empty(cls, layers: int, width: int) -> Tally:
        nothing = torch.zeros(0, dtype=torch.float64, device="cpu")
        return cls(
            nothing.long(),
            *[nothing] * 6,
            below=torch.zeros(layers, width, dtype=torch.float32, device="cpu"),
            medians=torch.zeros(layers, dtype=torch.float64, device="cpu"),
        )

    @property
    def layers(self) -> int:
        return self.below.shape[0]

    @property
    def width(self) -> int:
        return self.below.shape[1]

    def key(self, layer: int, channel: Tensor, role: Tensor, roles: int, value: Tensor) -> Tensor:
        """(N,) int64 keys of (N,) float64 values of one layer.

        A key is the number whose digits are layer, channel, role, sign and bin, each counted in its
        own base, so that `levels` gets them back by `divmod`. With 16 channels and 2 roles, -1000
        in channel 3 at role 1 of layer 2 is in bin floor(16 x log2 1000) + 8192 = 8351, which makes
            (((2 x 16 + 3) x 2 + 1) x 2 + 1) x 16384 + 8351
        """
        bins = (value.abs().log2() * _BINS_PER_OCTAVE).floor().long() + _BINS // 2
        place = (layer * self.width + channel) * roles + role
        return (place * 2 + (value < 0)) * _BINS + bins.clamp(0, _BINS - 1)

    def place(self, key: int, roles: int) -> tuple[int, int]:
        """The layer and channel of a key."""
        return divmod(key // _BINS // 2 // roles, self.width)

    def channels_with_a_hit(self, roles: int) -> set[tuple[int, int]]:
        """The channels (layer, channel) in which a value met the definition."""
        return {self.place(key, roles) for key in self.keys[self.hit.isfinite()].tolist()}

    def with_values(self, key: Tensor, value: Tensor, hit: Tensor) -> Tally:
        """This tally and (N,) new float64 values, of which `hit` (N,) bool met the definition."""
        one = torch.ones_like(value)
        magnitude = value.abs()
        rows = (
            key,
            one,
            value,
            torch.zeros_like(value),
            magnitude,
            magnitude,
            torch.where(hit, magnitude, torch.inf),
        )
        return self._with_rows(rows)

    def with_totals(self, below: Tensor, medians: Tensor, sequences: int, tokens: int) -> Tally:
        """This tally and the dense statistics of further sequences."""
        return replace(
            self,
            below=torch.maximum(self.below, below),
            medians=self.medians + medians,
            sequences=self.sequences + sequences,
            tokens=self.tokens + tokens,
        )

    def __add__(self, other: Tally) -> Tally:
        rows = tuple(getattr(other, name) for name in self.ROWS)
        return self._with_rows(rows).with_totals(
            other.below, other.medians, other.sequences, other.tokens
        )

    def _with_rows(self, rows: Sequence[Tensor]) -> Tally:
        keys, count, mean, deviation, low, high, hit = (
            torch.cat([getattr(self, name), new]) for name, new in zip(self.ROWS, rows)
        )
        # Rows of one key become one: keys 7 4 7 have the unique ones 4 7, at which they are put at
        # places 1 0 1. Their deviations add up about the common mean (Chan et al. 1979).
        unique, place = keys.unique(return_inverse=True)

        def total(x: Tensor) -> Tensor:
            return torch.zeros(len(unique), dtype=torch.float64, device="cpu").index_add(
                0, place, x
            )

        def extreme(x: Tensor, how: str) -> Tensor:
            return torch.zeros(len(unique), dtype=torch.float64, device="cpu").scatter_reduce(
                0, place, x, how, include_self=False
            )

        counts = total(count)
        means = total(count * mean) / counts
        return replace(
            self,
            keys=unique,
            count=counts,
            mean=means,
            deviation=total(deviation + count * (mean - means[place]) ** 2),
            low=extreme(low, "amin"),
            high=extreme(high, "amax"),
            hit=extreme(hit, "amin"),
        )


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
        rest, negative = divmod(key // _BINS, 2)
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
                )


def widespread(massive: Iterable[Level], tokens: int) -> set[tuple[int, int]]:
    """The channels (layer, channel) whose massive values are on most of the tokens."""
    counts = Counter[tuple[int, int]]()
    for level in massive:
        counts[level.layer, level.channel] += level.count
    return {place for place, count in counts.items() if count > MOST * tokens}


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
