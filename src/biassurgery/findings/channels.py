"""Channels side by side: outlier features are vectors, massive activations are single values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from biassurgery.findings.render import Printable, noted, number, table

if TYPE_CHECKING:
    import pandas
    from rich.console import Group

_MOST = 20  # channels that are printed


@dataclass(frozen=True)
class Channel:
    """One channel of the residual stream over all blocks.

    Attributes:
        channel: 0-based.
        largest: its largest magnitude in a sequence, mean over sequences, at `layer`.
        layer: the block where that is largest.
        ordinary: its mean magnitude there, over all values that are not massive.
        tokens: share of tokens at which its magnitude exceeds the threshold of outlier features,
            mean over blocks.
        massive: how many of its values meet the definition of a massive activation, all blocks
            together.
        outlier: whether it is an outlier feature.
    """

    channel: int
    largest: float
    layer: int
    ordinary: float
    tokens: float
    massive: int
    outlier: bool


@dataclass(frozen=True, repr=False)
class ChannelTable(Printable):
    """Massive activations beside outlier features (Dettmers et al. 2022).

    An outlier feature is large at most tokens; a massive activation is one value at very few.

    Attributes:
        channels: all of them, in order.
        threshold: the magnitude that counts in an outlier feature.
        tokens: how many were read.
    """

    channels: tuple[Channel, ...]
    threshold: float
    tokens: int

    @property
    def massive(self) -> tuple[Channel, ...]:
        """Those with massive activations, the largest first."""
        chosen = [one for one in self.channels if one.massive]
        return tuple(sorted(chosen, key=lambda one: -one.largest))

    @property
    def outliers(self) -> tuple[Channel, ...]:
        """The outlier features, those at most tokens first."""
        chosen = [one for one in self.channels if one.outlier]
        return tuple(sorted(chosen, key=lambda one: -one.tokens))

    def to_pandas(self) -> pandas.DataFrame:
        """One row a channel: largest, layer, ordinary, tokens, massive, outlier."""
        import pandas

        return pandas.DataFrame([asdict(one) for one in self.channels]).set_index("channel")

    def __repr__(self) -> str:
        return (
            f"ChannelTable({len(self.channels):,} channels: {len(self.massive)} with massive"
            f" activations, {len(self.outliers)} outlier features)"
        )

    def __rich__(self) -> Group:
        columns = ("channel", "largest", "at block", "else, mean", "massive", "tokens above")
        lines = table("Massive activations beside outlier features", *columns, "outlier")
        shown = dict.fromkeys((*self.massive, *self.outliers))
        for one in list(shown)[:_MOST]:
            lines.add_row(
                str(one.channel),
                number(one.largest),
                str(one.layer),
                number(one.ordinary),
                f"{one.massive:,}" if one.massive else "",
                f"{100 * one.tokens:.1f} %",
                "yes" if one.outlier else "",
            )
        both = sum(one.outlier for one in self.massive)
        note = (
            f"{len(self.massive)} channels with massive activations, {len(self.outliers)} outlier"
            f" features, {both} both; above {self.threshold:g}, of {self.tokens:,} tokens"
        )
        return noted(lines, note)
