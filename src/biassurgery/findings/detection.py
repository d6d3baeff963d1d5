"""What `detect` returns, and how it is printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from biassurgery.findings.detection_tables import (
    features_note,
    layers_table,
    positions_table,
    roles_table,
    uniform_table,
)
from biassurgery.findings.grid import Grid
from biassurgery.findings.observations import LayerSummary as LayerSummary
from biassurgery.findings.observations import PositionSummary as PositionSummary
from biassurgery.findings.observations import RoleSummary as RoleSummary
from biassurgery.findings.observations import TokenCount
from biassurgery.findings.observations import UniformChannel as UniformChannel
from biassurgery.findings.render import Printable, one_screen
from biassurgery.findings.sinks import Sinks
from biassurgery.findings.sites import Sites
from biassurgery.findings.standing_out import StandingOut, standing_out
from biassurgery.findings.summary import summary

if TYPE_CHECKING:
    import pandas
    from rich.console import Group


@dataclass(frozen=True, repr=False)
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

    @property
    def summary(self) -> tuple[str, str, str, str]:
        """What was found, where, attention sinks, and what to do next: a line each."""
        return summary(self.sites, self.layers, self.roles, self.sinks, self.no_sinks)

    @property
    def standing_out(self) -> StandingOut | None:
        """The channel that stands out most where nothing meets the definition; None: none does."""
        return standing_out(self.sites)

    def __repr__(self) -> str:
        head = f"Detection of {self.sequences:,} sequences, {self.tokens:,} tokens"
        return one_screen("\n".join((head, *(f"  {line}" for line in self.summary))))

    def __rich__(self) -> Group:
        """Four lines, then the tables: magnitudes per layer, tokens, sinks, and the sites."""
        from rich.console import Group
        from rich.text import Text

        tokens = []
        if self.roles:
            places = positions_table(self.positions, self.grid is not None, self.not_placed)
            tokens = [roles_table(self.roles), places]
        uniform = (
            [uniform_table(self.uniform_channels, self._massive_at())]
            if self.uniform_channels
            else []
        )
        sinks = (
            f"Attention sinks were not measured. {self.no_sinks}\n"
            if self.sinks is None
            else self.sinks.__rich__()
        )
        features = features_note(self.outlier_features, self.sites.origin.width, self.layers)
        note = f"means over {self.sequences:,} sequences, {self.tokens:,} tokens\n  {features}\n"
        return Group(
            Text("\n".join(self.summary) + "\n"),
            layers_table(self.layers, self._massive(), note),
            *tokens,
            *uniform,
            sinks,
            self.sites.__rich__(),
        )

    def _massive_at(self) -> Counter[tuple[int, int]]:
        """How many massive values each (layer, channel) has."""
        counts = Counter[tuple[int, int]]()
        for site in self.sites:
            counts[site.layer, site.channel] += site.count
        return counts

    def _massive(self) -> Counter[int]:
        """How many massive activations each layer has."""
        counts = Counter[int]()
        for role in self.roles:
            counts[role.layer] += role.count
        return counts


def roles_of(
    sites: Sites,
    tokens: Mapping[tuple[int, str], int],
    words: Mapping[tuple[int, str], tuple[TokenCount, ...]] | None = None,
) -> tuple[RoleSummary, ...]:
    """The massive activations of each layer and role, in the order of the sites.

    Args:
        sites: the massive activations.
        tokens: how many tokens of a (layer, role) hold them.
        words: which tokens of the vocabulary these are.
    """
    counts = Counter[tuple[int, str]]()
    totals = Counter[int]()
    for site in sites:
        counts[site.layer, site.role] += site.count
        totals[site.layer] += site.count
    return tuple(
        RoleSummary(
            layer,
            role,
            count,
            count / totals[layer],
            tokens.get((layer, role), 0),
            (words or {}).get((layer, role), ()),
        )
        for (layer, role), count in counts.items()
    )
