"""`detect`: what a model's hidden states look like, with and without the definition of a massive
activation.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Container, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.registry import Host, Tower, find_host
from biassurgery.data.batches import Batch, as_batches
from biassurgery.data.transforms import patch_kernel
from biassurgery.findings.grid import Grid, grid_of_batch, place_of
from biassurgery.findings.render import MOST_ROWS, Printable, noted, number, table
from biassurgery.findings.sites import Sites
from biassurgery.findings.tally import MOST
from biassurgery.measure.calibrate import check_measurable
from biassurgery.measure.one_pass import Measurement, eval_mode
from biassurgery.measure.sinks import Sinks, SinkStatistics, reason_against
from biassurgery.measure.uniform import UniformChannel, UniformStatistics

if TYPE_CHECKING:
    import pandas
    from rich.console import Group
    from rich.table import Table

# Dettmers et al. 2022
OUTLIER_MAGNITUDE = 6.0
OUTLIER_LAYERS = 0.25
OUTLIER_TOKENS = 0.06
OUTLIER_SEQUENCES = 0.90
_TOP = 3
_MOST_POSITIONS = 6


@dataclass(frozen=True)
class LayerSummary:
    """Magnitudes at one block's output, mean over sequences: the `top` three of the hidden state
    and its exact `median`.
    """

    layer: int
    top: tuple[float, float, float]
    median: float

    @property
    def ratio(self) -> float:
        """Largest magnitude over the median."""
        return self.top[0] / self.median if self.median else float("inf")


@dataclass(frozen=True)
class RoleSummary:
    """How many massive activations the tokens of one role hold at a layer, and which share of the
    layer's that is.
    """

    layer: int
    role: str
    count: int
    share: float


@dataclass(frozen=True)
class PositionSummary:
    """How many values meet the definition at one position of the sequence (padding and prefix
    tokens included) at a layer.

    In images a position is a `token` (its role) and, if that is a patch of a known grid, a `patch`
    (row, column); in text both are None.
    """

    layer: int
    position: int
    count: int
    token: str | None = None
    patch: tuple[int, int] | None = None

    @property
    def place(self) -> str:
        """Where it is, in words."""
        if self.patch is not None:
            return str(self.patch)
        return str(self.position) if self.token in (None, "patch") else self.token


@dataclass(frozen=True)
class Detection(Printable):
    """What `detect` found. `print` it for tables, `to_pandas` for a frame.

    Attributes:
        sites: the massive activations, as `calibrate` would return them.
        layers: magnitudes per block.
        roles: massive activations per layer and role.
        positions: where in the sequence values meet the definition, the most frequent position of a
            layer first; without the values of uniform channels, which are at most positions.
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

    def to_pandas(self) -> pandas.DataFrame:
        """One row a layer: top_1, top_2, top_3, median, ratio, massive (number of massive
        activations).
        """
        import pandas

        massive = {
            layer.layer: sum(role.count for role in self.roles if role.layer == layer.layer)
            for layer in self.layers
        }
        rows = [
            {
                "layer": s.layer,
                **{f"top_{i + 1}": v for i, v in enumerate(s.top)},
                "median": s.median,
                "ratio": s.ratio,
                "massive": massive[s.layer],
            }
            for s in self.layers
        ]
        return pandas.DataFrame(rows).set_index("layer")

    def __rich__(self) -> Group:
        """Magnitudes per layer, which tokens the massive activations are on, and the sites."""
        from rich.console import Group

        layers = table(
            "Magnitudes at each block's output",
            "layer",
            "top 1",
            "top 2",
            "top 3",
            "median",
            "top 1 / median",
            "massive",
        )
        massive: dict[int, int] = {}
        for role in self.roles:
            massive[role.layer] = massive.get(role.layer, 0) + role.count
        for layer in self.layers:
            found = f"{massive[layer.layer]:,}" if layer.layer in massive else ""
            layers.add_row(
                str(layer.layer),
                *(number(top) for top in layer.top),
                number(layer.median),
                number(layer.ratio),
                found,
                style="bold" if found else "",
            )
        features = ", ".join(map(str, self.outlier_features)) or "none"
        note = (
            f"means over {self.sequences:,} sequences, {self.tokens:,} tokens; outlier features:"
            f" {features}\n"
        )
        if not self.roles:
            return Group(
                noted(layers, note), *self._uniform_table(), self._sinks(), self.sites.__rich__()
            )
        roles = table(
            "Tokens with massive activations", "layer", "role", "count", "share", left=("role",)
        )
        for role in self.roles[:MOST_ROWS]:
            roles.add_row(
                str(role.layer), role.role, f"{role.count:,}", f"{100 * role.share:.1f} %"
            )
        return Group(
            noted(layers, note),
            roles,
            self._positions_table(),
            *self._uniform_table(),
            self._sinks(),
            self.sites.__rich__(),
        )

    def _sinks(self) -> Any:
        return (
            f"Attention sinks were not measured. {self.no_sinks}\n"
            if self.sinks is None
            else self.sinks.__rich__()
        )

    def _positions_table(self) -> Table:
        """One row a layer: the positions where values meet the definition most often."""
        heading = "(row, column) of a patch (count)" if self.grid else "position (count)"
        rows = table(
            "Positions with values that meet the definition", "layer", heading, left=(heading,)
        )
        for layer in dict.fromkeys(each.layer for each in self.positions):
            here = [each for each in self.positions if each.layer == layer]
            more = (
                f", and {len(here) - _MOST_POSITIONS} more" if len(here) > _MOST_POSITIONS else ""
            )
            rows.add_row(
                str(layer),
                ", ".join(f"{each.place} ({each.count:,})" for each in here[:_MOST_POSITIONS])
                + more,
            )
        return rows

    def _uniform_table(self) -> list[Any]:
        """One row a uniform channel, if there are any."""
        if not self.uniform_channels:
            return []
        rows = table(
            "Uniform channels: large at nearly all tokens",
            "layer",
            "channel",
            "mean magnitude",
            "mean / median",
            "tokens",
        )
        for each in self.uniform_channels[:MOST_ROWS]:
            rows.add_row(
                str(each.layer),
                str(each.channel),
                number(each.magnitude),
                number(each.ratio),
                f"{100 * each.share:.1f} %",
            )
        return [rows]


def detect(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    min_magnitude: float = 100.0,
    min_ratio: float = 1000.0,
    source: str = "",
    progress: bool | None = None,
    tower: Tower | None = None,
) -> Detection:
    """Look for massive activations, outlier features and attention sinks in one pass over data.
    Arguments and errors as in `calibrate`.

    Under `torch.distributed` each rank reports on its own batches. Sinks are measured where
    attention can be led through this library's core, which a run of the first sequence tells;
    hidden states then equal those of an attention that is not fused up to rounding.

    An outlier feature is a channel with magnitude above 6.0 in more than 25 % of layers and, there,
    at more than 6 % of tokens, on more than 90 % of sequences (Dettmers et al. 2022, as used by Sun
    et al. 2024, section 2).
    """
    host = find_host(model, tower)
    check_measurable(host, min_magnitude, min_ratio)
    statistics = _Statistics(len(host.blocks))
    uniform = UniformStatistics()

    def also(layer: int, magnitude: Tensor, real: Tensor | None, median: Tensor) -> None:
        statistics.see(layer, magnitude, real)
        uniform.see(layer, magnitude, median)

    checked = as_batches(host, batches)
    first = next(checked)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), eval_mode(host.model):
        no_sinks = reason_against(host, first)
    sinks = None if no_sinks else SinkStatistics(host)
    measurement = _Measurement(host, min_magnitude, min_ratio, also, sinks)
    with nullcontext() if sinks is None else sinks.attached():
        tally = measurement.run(
            chain([first], checked), progress=sys.stderr.isatty() if progress is None else progress
        )
    sites = Sites.from_tally(tally, measurement.origin(source))
    medians = (tally.medians / tally.sequences).tolist()
    layers = tuple(
        LayerSummary(layer, tuple((top / tally.sequences).tolist()), medians[layer])  # type: ignore[arg-type]
        for layer, top in enumerate(statistics.top)
    )
    spread = sites.widespread()
    return Detection(
        sites,
        layers,
        _roles(sites),
        measurement.summary(spread),
        statistics.outlier_features(),
        tally.sequences,
        tally.tokens,
        None if sinks is None else sinks.result(),
        no_sinks or "",
        uniform.result(tally.tokens, medians, spread),
        measurement.grid,
    )


class _Measurement(Measurement):
    """A measurement that knows the grids of patches, and tells the sink statistics about batches
    and tokens with massive activations.
    """

    def __init__(
        self,
        host: Host,
        min_magnitude: float,
        min_ratio: float,
        also: Callable[[int, Tensor, Tensor | None, Tensor], None],
        sinks: SinkStatistics | None,
    ) -> None:
        self.sinks = sinks
        self.grids = set[Grid | None]()
        self.images = host.adapter.modality == "image"
        super().__init__(host, min_magnitude, min_ratio, also)

    def start_batch(self, batch: dict[str, Any]) -> None:
        super().start_batch(batch)
        if self.sinks is not None and batch:
            self.sinks.begin(batch)

    def see(self, layer: int, hidden: Tensor) -> None:
        super().see(layer, hidden)
        if layer == 0 and self.images:
            self.grids.add(
                grid_of_batch(
                    self._batch, self.host.roles, hidden.shape[1], patch_kernel(self.host.model)
                )
            )

    def take(
        self,
        layer: int,
        hidden: Tensor,
        magnitude: Tensor,
        roles: Tensor,
        channels: Tensor,
        threshold: Tensor,
        floor: Tensor,
        below: Tensor,
    ) -> Tensor:
        if self.sinks is not None:
            hit = magnitude[..., channels].float() > threshold[:, None, None]
            if self.images:  # as `Sites` has it, but by batch, for the next layer asks now
                hit &= hit.float().mean((0, 1)) <= MOST
            if hit.any():
                self.sinks.see_massive(layer, hit.any(-1))
        return super().take(layer, hidden, magnitude, roles, channels, threshold, floor, below)

    @property
    def grid(self) -> Grid | None:
        """The grid of all images read, if it is one."""
        return next(iter(self.grids)) if len(self.grids) == 1 else None

    def summary(self, left_out: Container[tuple[int, int]]) -> tuple[PositionSummary, ...]:
        """Values at each position, the most frequent of a layer first, without those of some
        channels (layer, channel).
        """
        counts = Counter[tuple[int, int]]()
        for (layer, channel, position), count in self.positions.items():
            if (layer, channel) not in left_out:
                counts[layer, position] += count
        order = sorted(counts.items(), key=lambda item: (item[0][0], -item[1], item[0][1]))
        return tuple(
            PositionSummary(layer, position, count, *self._place(position))
            for (layer, position), count in order
        )

    def _place(self, position: int) -> tuple[str | None, tuple[int, int] | None]:
        return place_of(position, self.host.roles, self.grid) if self.images else (None, None)


def _roles(sites: Sites) -> tuple[RoleSummary, ...]:
    counts: dict[tuple[int, str], int] = {}
    for site in sites:
        counts[site.layer, site.role] = counts.get((site.layer, site.role), 0) + site.count
    totals: dict[int, int] = {}
    for (layer, _), count in counts.items():
        totals[layer] = totals.get(layer, 0) + count
    return tuple(
        RoleSummary(layer, role, count, count / totals[layer])
        for (layer, role), count in counts.items()
    )


class _Statistics:
    """Top magnitudes per layer, and on how many sequences each channel counts as an outlier
    feature.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.top = [torch.zeros(_TOP, dtype=torch.float64, device="cpu")] * layers
        self.outlying: Tensor | None = None  # (D,) sequences so far on which the channel qualified
        self.sequences = 0
        self._layers_above: Tensor | None = (
            None  # (B, D) layers of this batch with enough tokens above
        )

    def see(self, layer: int, magnitude: Tensor, real: Tensor | None) -> None:
        """Take one block's magnitudes (B, T, D), 0 at padding."""
        rows = magnitude.shape[0]
        flat = magnitude.flatten(1)
        top = flat.topk(min(_TOP, flat.shape[1])).values.double().sum(0).cpu()
        self.top[layer] = self.top[layer] + torch.nn.functional.pad(top, (0, _TOP - len(top)))
        tokens = (
            torch.full((rows, 1), magnitude.shape[1], device=magnitude.device)
            if real is None
            else real.sum(1, keepdim=True)
        )
        above = ((magnitude > OUTLIER_MAGNITUDE).sum(1) > OUTLIER_TOKENS * tokens).cpu()
        self._layers_above = (
            above.int() if layer == 0 or self._layers_above is None else self._layers_above + above
        )
        if layer == self.layers - 1:
            qualified = (self._layers_above > OUTLIER_LAYERS * self.layers).sum(0)
            self.outlying = qualified if self.outlying is None else self.outlying + qualified
            self.sequences += int((tokens > 0).sum())

    def outlier_features(self) -> tuple[int, ...]:
        """Channels that qualified on enough sequences."""
        assert self.outlying is not None  # a pass without batches was refused
        return tuple((self.outlying > OUTLIER_SEQUENCES * self.sequences).nonzero()[:, 0].tolist())
