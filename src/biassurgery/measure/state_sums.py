"""Sums over the hidden states of one block, a sequence at a time; memory is that of one state."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from biassurgery.findings.hidden_state import Carrier, RankedMagnitude, Variation

_RANKS = {f"top {rank}": rank for rank in (1, 2, 3, 4, 5, 10, 100)}
_SHARES = {"top 1 %": 0.01, "top 10 %": 0.1, "median": 0.5}
_PLACES = ("top 1", "top 2", "top 1 %", "top 10 %", "median")


class RankSums:
    """The magnitudes of states (T, D) at some ranks, to be averaged over sequences."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {name: [0.0, 0] for name in (*_RANKS, *_SHARES)}

    def add(self, state: Tensor) -> None:
        magnitudes = state.abs().flatten()
        for name, rank in _ranks(len(magnitudes)).items():
            value = magnitudes.kthvalue(len(magnitudes) + 1 - rank).values.item()
            self._sums[name][0] += value
            self._sums[name][1] += 1

    def rows(self) -> tuple[RankedMagnitude, ...]:
        """The ranks that there were."""
        return tuple(
            RankedMagnitude(name, total / count)
            for name, (total, count) in self._sums.items()
            if count
        )


class Running:
    """Mean and sum of squares about it of numbers or tensors that come one by one (Welford)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self._about: Tensor | float = 0.0

    def add(self, value: Tensor | float) -> None:
        self.count += 1
        before = value - self.mean
        self.mean = self.mean + before / self.count
        self._about = self._about + before * (value - self.mean)

    @property
    def variance(self) -> Tensor | float:
        return self._about / self.count

    def cut(self, length: int) -> None:
        """Forget what is behind the first rows of tensors."""
        if isinstance(self.mean, Tensor) and isinstance(self._about, Tensor):
            self.mean, self._about = self.mean[:length], self._about[:length]


class PlaceSums:
    """Values at every place (token, channel) that all sequences have, counted from their starts."""

    def __init__(self) -> None:
        self.length: int | None = None
        self._values = Running()
        self._magnitudes = Running()

    def add(self, state: Tensor) -> None:
        """A state (T, D) of a sequence without padding."""
        self.length = len(state) if self.length is None else min(self.length, len(state))
        for running, values in ((self._values, state), (self._magnitudes, state.abs())):
            running.cut(self.length)
            running.add(values[: self.length])

    @property
    def sequences(self) -> int:
        return self._values.count

    def rows(self) -> tuple[Variation, ...]:
        """The places whose mean magnitudes are at some ranks."""
        mean, variance, magnitude = self._values.mean, self._values.variance, self._magnitudes.mean
        assert isinstance(magnitude, Tensor)  # something was added
        assert isinstance(mean, Tensor)
        assert isinstance(variance, Tensor)
        order = magnitude.flatten().argsort(descending=True)
        ranks = _ranks(len(order))
        rows = []
        for name in (name for name in _PLACES if name in ranks):
            token, channel = divmod(int(order[ranks[name] - 1]), magnitude.shape[1])
            here = (mean[token, channel].item(), variance[token, channel].item())
            rows.append(Variation(name, token, channel, *here))
        return tuple(rows)


class Held:
    """The massive values: whose they are, and how they vary.

    Args:
        min_magnitude, min_ratio: the definition, as in `detect`.
        gates: by channel, the magnitude beyond which its values are massive; None: the definition
            says which are.
    """

    def __init__(
        self, min_magnitude: float, min_ratio: float, gates: Mapping[int, float] | None = None
    ) -> None:
        self.min_magnitude = min_magnitude
        self.min_ratio = min_ratio
        self.gates = gates
        self._tokens: dict[tuple[int, int], list[tuple[int, float]]] = {}
        self._roles: dict[tuple[int, int], Running] = {}

    def add(self, state: Tensor, ids: Tensor, roles: Tensor | None = None) -> None:
        """A state (T, D), the ids (T,) of its tokens and, if told apart, their roles."""
        for position, channel in self._massive(state.abs()).nonzero().tolist():
            value = state[position, channel].item()
            key = (channel, int(ids[position]))
            self._tokens.setdefault(key, []).append((position, value))
            if roles is not None:
                key = (channel, int(roles[position]))
                self._roles.setdefault(key, Running()).add(value)

    def _massive(self, magnitude: Tensor) -> Tensor:
        """(T, D) bool."""
        if self.gates is None:
            median = magnitude.flatten().median().item()
            return magnitude > max(self.min_magnitude, self.min_ratio * median)
        gates = magnitude.new_full(magnitude.shape[1:], float("inf"))
        for channel, gate in self.gates.items():
            gates[channel] = gate
        return magnitude > gates

    def carriers(self, text_of: Callable[[int], str]) -> tuple[Carrier, ...]:
        """By channel and token, the most frequent first."""
        rows = [
            Carrier(
                channel,
                token,
                text_of(token),
                (min(at for at, _ in held), max(at for at, _ in held)),
                len(held),
                sum(value for _, value in held) / len(held),
            )
            for (channel, token), held in self._tokens.items()
        ]
        return tuple(sorted(rows, key=lambda row: (-row.count, -abs(row.mean))))

    def rows(self, names: tuple[str, ...]) -> tuple[Variation, ...]:
        """By channel and role, the largest first."""
        rows = [
            Variation(
                f"massive, {names[role]}", None, channel, float(some.mean), float(some.variance)
            )
            for (channel, role), some in self._roles.items()
        ]
        return tuple(sorted(rows, key=lambda row: -abs(row.mean)))


def _ranks(total: int) -> dict[str, int]:
    """The ranks that there are among so many values, from 1, by name."""
    ranks = {name: rank for name, rank in _RANKS.items() if rank <= total}
    return ranks | {name: max(1, round(share * total)) for name, share in _SHARES.items()}
