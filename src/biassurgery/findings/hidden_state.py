"""Tables about one block's output: its largest values, how they vary, and whose they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from biassurgery.findings.render import MOST_ROWS, Printable, noted, number, table

if TYPE_CHECKING:
    import pandas
    from rich.console import Group
    from rich.table import Table


@dataclass(frozen=True)
class RankedMagnitude:
    """One magnitude of a hidden state, by its rank among all."""

    rank: str
    magnitude: float


@dataclass(frozen=True)
class MagnitudeTable(Printable):
    """The largest magnitudes of a block's output; Sun et al. 2024, table 1.

    Attributes:
        layer: 0-based index of the block.
        rows: top 1 to 5, 10, 100, top 1 % and 10 %, median; means over sequences.
    """

    layer: int
    rows: tuple[RankedMagnitude, ...]

    def __getitem__(self, rank: str) -> float:
        return next(row.magnitude for row in self.rows if row.rank == rank)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a rank: magnitude."""
        return _frame(self.rows, "rank")

    def __rich__(self) -> Table:
        title = f"Magnitudes at the output of block {self.layer}"
        lines = table(title, "rank", "magnitude", left=("rank",))
        for row in self.rows:
            lines.add_row(row.rank, number(row.magnitude))
        return lines


@dataclass(frozen=True)
class Variation:
    """One place of the hidden state, (token, channel), and its values over sequences.

    `token` is None where the values are massive activations, wherever in their sequence they are.
    """

    rank: str
    token: int | None
    channel: int
    mean: float
    variance: float

    @property
    def spread(self) -> float:
        """The standard deviation over the magnitude of the mean."""
        return self.variance**0.5 / abs(self.mean) if self.mean else float("inf")


@dataclass(frozen=True)
class VariationTable(Printable):
    """Mean and variance at places of a block's output; Sun et al. 2024, table 2.

    Attributes:
        layer: 0-based index of the block.
        rows: the massive activations of each channel and role, where these were told apart; then
            the places with the two largest mean magnitudes, and with those at the top 1 %, the top
            10 % and the median. The variance is that of the population.
    """

    layer: int
    rows: tuple[Variation, ...]

    def __getitem__(self, rank: str) -> Variation:
        return next(row for row in self.rows if row.rank == rank)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a place: token, channel, mean, variance."""
        return _frame(self.rows, "rank")

    def __rich__(self) -> Table:
        columns = ("place", "token", "channel", "mean", "variance", "std / |mean|")
        lines = table(f"Values at the output of block {self.layer}", *columns, left=("place",))
        for row in self.rows:
            lines.add_row(
                row.rank,
                "" if row.token is None else str(row.token),
                str(row.channel),
                number(row.mean),
                number(row.variance),
                number(row.spread),
            )
        return lines


@dataclass(frozen=True)
class Carrier:
    """A token that holds massive activations in a channel: where, how often, and their mean.

    `positions` are the least and the greatest one of the token that held any.
    """

    channel: int
    token_id: int
    text: str
    positions: tuple[int, int]
    count: int
    mean: float


@dataclass(frozen=True)
class CarrierTable(Printable):
    """Which tokens carry the massive activations of a block's output, the most frequent first."""

    layer: int
    rows: tuple[Carrier, ...]

    def to_pandas(self) -> pandas.DataFrame:
        """One row a channel and token: token_id, text, positions, count, mean."""
        return _frame(self.rows, "channel")

    def __rich__(self) -> Group:
        columns = ("channel", "token", "position", "count", "mean value")
        title = f"Tokens that carry massive activations at the output of block {self.layer}"
        lines = table(title, *columns, left=("token",))
        for row in self.rows[:MOST_ROWS]:
            first, last = row.positions
            place = str(first) if first == last else f"{first} to {last}"
            cells = (repr(row.text), place, str(row.count), number(row.mean))
            lines.add_row(str(row.channel), *cells)
        more = len(self.rows) - MOST_ROWS
        return noted(lines, f"and {more:,} more\n" if more > 0 else "")


@dataclass(frozen=True, repr=False)
class HiddenStateTables(Printable):
    """What one block's output looks like: tables 1 and 2 of Sun et al. 2024, and the tokens.

    Attributes:
        layer: 0-based index of the block.
        sequences: how many were read.
        magnitudes: the largest magnitudes, and the median.
        variation: how massive activations, and other values, vary over sequences; None: there was
            one sequence.
        carriers: the tokens that hold massive activations; in images by their positions.
    """

    layer: int
    sequences: int
    magnitudes: MagnitudeTable
    variation: VariationTable | None
    carriers: CarrierTable

    def __repr__(self) -> str:
        return f"HiddenStateTables(block {self.layer}, {self.sequences:,} sequences)"

    def __rich__(self) -> Group:
        from rich.console import Group

        parts = (self.magnitudes, self.variation, self.carriers if self.carriers.rows else None)
        return Group(*(part.__rich__() for part in parts if part is not None))


def _frame(rows: Sequence[Any], index: str) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame([asdict(row) for row in rows]).set_index(index)
