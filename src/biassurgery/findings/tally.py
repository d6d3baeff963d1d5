"""What calibration remembers: a sparse table of large values per layer, channel and role.

Its size does not grow with the data. A channel's large values are kept as a histogram on a log
scale (16 bins an octave, signs apart) in which every bin knows its exact count, mean, squared
deviation, smallest and largest magnitude. Two tallies add up to exactly the tally of both data
sets, and everything that a `Site` says is derived from it at the end, so that the data are read
once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_BINS_PER_OCTAVE = 16
BINS = 1 << 14  # covers every exponent of a float32, from 2^-512 to 2^512
MOST_STARTS = 8  # start tokens that are remembered: enough to know that they vary


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
        grown: (P,) int64, the triples (channel, from, to) of blocks between which a value of the
            channel grew by more than the definition, to one that meets it; (channel, to, to): what
            a run under a patch of the blocks before left standing there. None: not known.
        growth: (P,) float64, the smallest such growth.
        starts: the ids of the tokens that sequences began with, ascending, and of more than
            `MOST_STARTS` the smallest; None: not known.
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
    grown: Tensor | None = None
    growth: Tensor | None = None
    starts: tuple[int, ...] | None = None

    ROWS = ("keys", "count", "mean", "deviation", "low", "high", "hit")

    @classmethod
    def empty(cls, layers: int, width: int) -> Tally:
        nothing = torch.zeros(0, dtype=torch.float64, device="cpu")
        return cls(
            nothing.long(),
            *[nothing] * 6,
            below=torch.zeros(layers, width, dtype=torch.float32, device="cpu"),
            medians=torch.zeros(layers, dtype=torch.float64, device="cpu"),
            grown=nothing.long(),
            growth=nothing,
            starts=(),
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
        bins = (value.abs().log2() * _BINS_PER_OCTAVE).floor().long() + BINS // 2
        place = (layer * self.width + channel) * roles + role
        return (place * 2 + (value < 0)) * BINS + bins.clamp(0, BINS - 1)

    def place(self, key: int, roles: int) -> tuple[int, int]:
        """The layer and channel of a key."""
        return divmod(key // BINS // 2 // roles, self.width)

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

    def with_starts(self, starts: Iterable[int] | None) -> Tally:
        """This tally and further start tokens; None: those are not known."""
        if self.starts is None or starts is None:
            return replace(self, starts=None)
        both = sorted({*self.starts, *starts})
        return replace(self, starts=tuple(both[:MOST_STARTS]))

    def with_growth(self, channel: Tensor, start: Tensor, end: Tensor, growth: Tensor) -> Tally:
        """This tally and (P,) float64 magnitudes by which channels grew from block to block."""
        return self._with_grown((channel * self.layers + start) * self.layers + end, growth)

    def _with_grown(self, grown: Tensor | None, growth: Tensor | None) -> Tally:
        if self.grown is None or self.growth is None or grown is None or growth is None:
            return replace(self, grown=None, growth=None)
        keys, place = torch.cat([self.grown, grown]).unique(return_inverse=True)
        values = torch.cat([self.growth, growth])
        least = values.new_zeros(len(keys)).scatter_reduce(
            0, place, values, "amin", include_self=False
        )
        return replace(self, grown=keys, growth=least)

    def growths(self) -> dict[tuple[int, int, int], float] | None:
        """The smallest growth of each (channel, from, to); None: not known."""
        if self.grown is None or self.growth is None:
            return None
        triples = zip(self.grown.tolist(), self.growth.tolist())
        layers = self.layers
        return {
            (key // layers**2, key // layers % layers, key % layers): growth
            for key, growth in triples
        }

    def __add__(self, other: Tally) -> Tally:
        rows = tuple(getattr(other, name) for name in self.ROWS)
        return (
            self._with_rows(rows)
            .with_totals(other.below, other.medians, other.sequences, other.tokens)
            ._with_grown(other.grown, other.growth)
            .with_starts(other.starts)
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


def magnitude_of(key: Tensor) -> Tensor:
    """(N,) float64: the least magnitude in the bins of (N,) keys."""
    return torch.exp2((key % BINS - BINS // 2).double() / _BINS_PER_OCTAVE)


def role_of(key: int, roles: int) -> int:
    """The role of a key, by its index."""
    return key // BINS // 2 % roles
