"""What each channel is like: large at one token, or at all of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from biassurgery.adapters.registry import Tower, find_host
from biassurgery.data.batches import Batch, as_batches
from biassurgery.findings.channels import Channel, ChannelTable
from biassurgery.measure.calibrate import check_measurable
from biassurgery.measure.one_pass import Pass
from biassurgery.measure.outliers import MAGNITUDE, OutlierFeatures
from biassurgery.measure.statistic import BlockOutput


def channel_table(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    min_magnitude: float = 100.0,
    min_ratio: float = 1000.0,
    progress: bool | None = None,
    tower: Tower | None = None,
) -> ChannelTable:
    """Every channel of a model: how large it gets, and at how many tokens it is large.

    Massive activations are single values at very few tokens; outlier features (Dettmers et al.
    2022) are large at most. Source: Sun et al. 2024, section 2. `detect` counts it in its own pass
    with `statistics="channels"`.

    Args:
        model: a model of a supported architecture.
        batches: see `detect`.
        min_magnitude, min_ratio: the definition of a massive activation, as in `detect`.
        progress: show a progress bar; None: only on a terminal.
        tower: `vision` (default) or `text`, of a model that has both.

    Raises:
        BadBatch, NonFiniteActivation, BadOption: see their messages; the model is as it was.
    """
    host = find_host(model, tower)
    check_measurable(host, min_magnitude, min_ratio)
    channels = Channels(host)
    one_pass = Pass(host, min_magnitude, min_ratio, [channels])
    one_pass.read(as_batches(host, batches), "channels", progress, given=batches)
    return channels.result()


class Channels(OutlierFeatures):
    """For each block and channel (D,) its peaks, tokens above 6.0, and massive values.

    Source: Sun et al. 2024, section 2, on the difference from outlier features.
    """

    name = "channels"

    def see(self, output: BlockOutput) -> None:
        super().see(output)
        massive = output.magnitude > output.threshold[:, None, None]
        counted = {
            "peak": output.peak.double().sum(0),
            "above": (output.magnitude > MAGNITUDE).sum((0, 1)).double(),
            "massive": massive.sum((0, 1)).double(),
            "ordinary": output.magnitude.masked_fill(massive, 0).double().sum((0, 1)),
        }
        for name, row in counted.items():
            self.totals.add((output.layer, name), row)
        if output.layer == 0:
            self.totals.add("tokens", int(output.real.sum()))

    def result(self) -> ChannelTable:  # type: ignore[override]
        layers = sorted(layer for layer, name in _keys(self.totals) if name == "peak")
        stacked = {
            name: torch.stack([self.totals[layer, name] for layer in layers])
            for name in ("peak", "above", "massive", "ordinary")
        }
        count = self.totals["tokens"]
        largest, at = (stacked["peak"] / self.totals["sequences"]).max(0)
        ordinary = stacked["ordinary"] / (count - stacked["massive"]).clamp(min=1)
        ordinary = ordinary.gather(0, at[None])[0]
        tokens = stacked["above"].mean(0) / count
        massive = stacked["massive"].sum(0)
        outliers = set(super().result())
        columns = (largest, at, ordinary, tokens, massive)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return ChannelTable(
            tuple(
                Channel(channel, peak, layers[place], usual, share, int(many), channel in outliers)
                for channel, (peak, place, usual, share, many) in enumerate(rows)
            ),
            MAGNITUDE,
            count,
        )


def _keys(totals: object) -> list[tuple[int, str]]:
    """Those of sums by block."""
    assert isinstance(totals, dict)
    return [key for key in totals if isinstance(key, tuple)]
