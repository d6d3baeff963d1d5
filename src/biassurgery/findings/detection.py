"""What `detect` returns, and how it is printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from biassurgery.findings.grid import Grid
from biassurgery.findings.render import MOST_ROWS, Printable, noted, number, table
from biassurgery.findings.sinks import Sinks
from biassurgery.findings.sites import Sites

if TYPE_CHECKING:
    import pandas
    from rich.console import Group
    from rich.table import Table

_MOST_POSITIONS = 6


@dataclass(frozen=True)
class LayerSummary:
    """Magnitudes at a block's output, mean over sequences: `top` three and exact `median`."""

    layer: int
    top: tuple[float, float, float]
    median: float

    @property
    def ratio(self) -> float:
        """Largest magnitude over the median."""
        return self.top[0] / self.median if self.median else float("inf")


@dataclass(frozen=True)
class RoleSummary:
    """The massive activations of a layer on tokens of one role.

    Attributes:
        layer: 0-based.
        role: of the tokens.
        count: how many values; a token has one in each channel that is massive at it.
        share: of the layer's massive activations.
        tokens: how many tokens hold them, without those that `Detection.not_placed` counts.
    """

    layer: int
    role: str
    count: int
    share: float
    tokens: int = 0


@dataclass(frozen=True)
class PositionSummary:
    """How many massive activations are at one position of the sequence at a layer.

    Padding and prefix tokens have positions, too. In images a position is a `token` (its role) and,
    if that is a patch of a known grid, a `patch` (row, column); in text both are None. `count` is
    the number of values, `tokens` that of the tokens that hold them.
    """

    layer: int
    position: int
    count: int
    token: str | None = None
    patch: tuple[int, int] | None = None
    tokens: int = 0

    @property
    def place(self) -> str:
        """Where it is, in words."""
        if self.patch is not None:
            return str(self.patch)
        return str(self.position) if self.token in (None, "patch") else self.token


@dataclass(frozen=True)
class UniformChannel:
    """A channel whose magnitude is beyond 10 times the median at 95 % of the tokens or more.

    It is one of a block's output, and the median is that of the whole hidden state. Also one whose
    massive values are on more than half of the tokens (in text, of those that start no sequence):
    massive activations are on few, so it has no sites. One whose massive values are on few tokens
    has sites, however large the others are: both are true of it.

    Attributes:
        layer, channel: 0-based.
        magnitude: mean over the tokens.
        ratio: that over the layer's median, a mean over sequences.
        share: of the tokens at which the magnitude is beyond 10 medians.
    """

    layer: int
    channel: int
    magnitude: float
    ratio: float
    share: float


@dataclass(frozen=True)
class Detection(Printable):
    """What `detect` found. `print` it for tables, `to_pandas` for a frame.

    Attributes:
        sites: the massive activations, as `calibrate` would return them.
        layers: magnitudes per block.
        roles: massive activations per layer and role.
        positions: where in the sequence the massive activations are, the most frequent position of
            a layer first.
        outlier_features: channels that are outlier features (Dettmers et al. 2022), which are a
            different thing.
        sequences, tokens: how many were read.
        sinks: attention sinks, and their overlap with massive activations; None where the attention
            cannot be read.
        no_sinks: why it cannot.
        uniform_channels: channels that are large at nearly all tokens, which are another thing
            again.
        grid: rows and columns of the patches of an image; None in text, and where images of several
            grids were read.
        statistics: the results of the further statistics that were asked for, by name.
        not_placed: how many massive activations are missing in `positions` and in the overlap of
            `sinks` with them: those far below the definition in batches before their channel first
            met it.
    """

    sites: Sites
    layers: tuple[LayerSummary, ...]
    roles: tuple[RoleSummary, ...]
    positions: tuple[PositionSummary, ...]
    outlier_features: tuple[int, ...]
    sequences: int
    tokens: int
    sinks: Sinks | None = None
    no_sinks: str = ""
    uniform_channels: tuple[UniformChannel, ...] = ()
    grid: Grid | None = None
    statistics: Mapping[str, Any] = field(default_factory=dict)
    not_placed: int = 0

    def to_pandas(self) -> pandas.DataFrame:
        """One row a layer: top_1, top_2, top_3, median, ratio, massive (number of activations)."""
        import pandas

        massive = self._massive()
        rows = [
            {
                "layer": layer.layer,
                **{f"top_{rank}": top for rank, top in enumerate(layer.top, 1)},
                "median": layer.median,
                "ratio": layer.ratio,
                "massive": massive[layer.layer],
            }
            for layer in self.layers
        ]
        return pandas.DataFrame(rows).set_index("layer")

    def __rich__(self) -> Group:
        """Magnitudes per layer, which tokens the massive activations are on, and the sites."""
        from rich.console import Group

        tokens = [self._roles_table(), self._positions_table()] if self.roles else []
        uniform = [self._uniform_table()] if self.uniform_channels else []
        sinks = (
            f"Attention sinks were not measured. {self.no_sinks}\n"
            if self.sinks is None
            else self.sinks.__rich__()
        )
        return Group(self._layers_table(), *tokens, *uniform, sinks, self.sites.__rich__())

    def _massive(self) -> Counter[int]:
        """How many massive activations each layer has."""
        counts = Counter[int]()
        for role in self.roles:
            counts[role.layer] += role.count
        return counts

    def _layers_table(self) -> Group:
        """One row a layer: its magnitudes."""
        columns = ("layer", "top 1", "top 2", "top 3", "median", "top 1 / median", "massive values")
        rows = table("Magnitudes at each block's output", *columns)
        massive = self._massive()
        for layer in self.layers:
            count = massive[layer.layer]
            rows.add_row(
                str(layer.layer),
                *(number(top) for top in layer.top),
                number(layer.median),
                number(layer.ratio),
                f"{count:,}" if count else "",
                style="bold" if count else "",
            )
        features = ", ".join(map(str, self.outlier_features)) or "none"
        note = (
            f"means over {self.sequences:,} sequences, {self.tokens:,} tokens; outlier features:"
            f" {features}\n"
        )
        return noted(rows, note)

    def _roles_table(self) -> Table:
        """One row a layer and role: how many massive values its tokens hold, and how many do."""
        columns = ("layer", "role", "values", "tokens", "share of values")
        rows = table("Massive activations by role", *columns, left=("role",))
        for role in self.roles[:MOST_ROWS]:
            counts = (f"{role.count:,}", f"{role.tokens:,}", f"{100 * role.share:.1f} %")
            rows.add_row(str(role.layer), role.role, *counts)
        return rows

    def _positions_table(self) -> Group:
        """One row a layer: the positions where most massive activations are."""
        heading = "(row, column) of a patch (values)" if self.grid else "position (values)"
        rows = table("Positions of massive activations", "layer", heading, left=(heading,))
        by_layer: dict[int, list[PositionSummary]] = {}
        for position in self.positions:
            by_layer.setdefault(position.layer, []).append(position)
        for layer, positions in by_layer.items():
            first = (f"{p.place} ({p.count:,})" for p in positions[:_MOST_POSITIONS])
            more = len(positions) - _MOST_POSITIONS
            rows.add_row(str(layer), ", ".join(first) + (f", and {more} more" if more > 0 else ""))
        note = f"without {self.not_placed:,} that were read before their channel was known\n"
        return noted(rows, note if self.not_placed else "")

    def _uniform_table(self) -> Table:
        """One row a uniform channel."""
        columns = (
            "layer",
            "channel",
            "mean magnitude",
            "mean / median",
            "tokens",
            "massive values",
        )
        rows = table("Uniform channels: large at nearly all tokens", *columns)
        massive = Counter[tuple[int, int]]()
        for site in self.sites:
            massive[site.layer, site.channel] += site.count
        for channel in self.uniform_channels[:MOST_ROWS]:
            rows.add_row(
                str(channel.layer),
                str(channel.channel),
                number(channel.magnitude),
                number(channel.ratio),
                f"{100 * channel.share:.1f} %",
                f"{count:,}" if (count := massive[channel.layer, channel.channel]) else "",
            )
        return rows


def roles_of(sites: Sites, tokens: Mapping[tuple[int, str], int]) -> tuple[RoleSummary, ...]:
    """The massive activations of each layer and role, in the order of the sites.

    Args:
        sites: the massive activations.
        tokens: how many tokens of a (layer, role) hold them.
    """
    counts = Counter[tuple[int, str]]()
    totals = Counter[int]()
    for site in sites:
        counts[site.layer, site.role] += site.count
        totals[site.layer] += site.count
    return tuple(
        RoleSummary(layer, role, count, count / totals[layer], tokens.get((layer, role), 0))
        for (layer, role), count in counts.items()
    )
