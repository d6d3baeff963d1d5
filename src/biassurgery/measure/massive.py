"""The massive activations of a model, as the statistic that `calibrate` and `detect` share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from biassurgery.adapters.devices import input_device
from biassurgery.adapters.registry import Host
from biassurgery.adapters.scale import scale_of
from biassurgery.findings.derived import START
from biassurgery.findings.levels import massive_keys
from biassurgery.findings.sites import Origin, Sites
from biassurgery.findings.tally import Tally
from biassurgery.measure.growth import Large, growth_of
from biassurgery.measure.kept import Kept
from biassurgery.measure.statistic import BlockOutput, Statistic

# values down to this fraction of the definition's threshold are kept, to find the gap below the
# massive ones
_FLOOR = 32.0
_FLOOR_IN_MEDIANS = 8.0  # but none of the ordinary ones


class MassiveActivations(Statistic):
    """The large values of every layer, channel and role: a `Tally`, from which `Sites` follow.

    Only values above a floor leave the device; all others are reduced there.
    """

    name = "massive_activations"
    in_batch = ("_below", "_medians", "_real", "_roles")

    def __init__(
        self,
        host: Host,
        min_magnitude: float = 100.0,
        min_ratio: float = 1000.0,
        source: str = "",
        start: int | None = None,
    ) -> None:
        super().__init__(host)
        self.totals: Tally = Tally.empty(len(host.blocks), host.width)
        self.kept = Kept()
        self.origin = Origin(
            host.architecture,
            len(host.blocks),
            host.width,
            host.roles,
            min_magnitude,
            min_ratio,
            source,
            start,
            factor=scale_of(host),
        )

    def begin(self, batch: Mapping[str, Any]) -> None:
        self._batch = batch
        self._large: list[Large] = []
        self._below: dict[int, Tensor] = {}
        self._medians: dict[int, Tensor] = {}

    def see(self, output: BlockOutput) -> None:
        floor = floor_of(output)
        is_large = (output.peak > floor[:, None]).any(0)
        channels = is_large.nonzero()[:, 0]
        below = torch.where(is_large, 0, output.peak.amax(0))
        if len(channels):
            below = below.index_copy(0, channels, self._set_aside(output, channels, floor))
        self._below[output.layer] = below
        self._medians[output.layer] = output.median.double().sum()
        self._real = output.real
        self._roles = output.roles

    def _set_aside(self, output: BlockOutput, channels: Tensor, floor: Tensor) -> Tensor:
        """Keep the values above the floor (B,) in some channels (C,) for the end of the batch.

        Returns the largest magnitude of what remains in each of these channels, (C,).
        """
        columns = output.magnitude[..., channels].float()
        above = columns > floor[:, None, None]
        row, token, column = above.nonzero(as_tuple=True)
        channel = channels[column]
        role = output.roles[row, token]
        places = torch.stack([channel, role, row, token]).cpu()
        values = output.hidden[row, token, channel].double()
        numbers = torch.stack([values, output.threshold[row].double()]).cpu()
        self._large.append(Large(output.layer, *places, *numbers))
        return columns.masked_fill(above, 0).amax((0, 1))

    def end(self) -> None:
        """Move what was set aside to the table; until now the batch has left no trace in it."""
        tally = self.totals
        if self._large:
            keys = [
                self.key(large.layer, large.channel, large.role, large.value)
                for large in self._large
            ]
            tally = tally.with_values(
                torch.cat(keys),
                torch.cat([large.value for large in self._large]),
                torch.cat([large.massive for large in self._large]),
            )
        for growth in growth_of(self._large, tally.layers):
            tally = tally.with_growth(*growth)
        layers = range(len(self.host.blocks))
        nothing = tally.medians.new_zeros(())  # of a block that did not run
        self.totals = tally.with_totals(
            below=torch.stack(
                [self._below.get(layer, tally.below[layer]).cpu() for layer in layers]
            ),
            medians=torch.stack([self._medians.get(layer, nothing).cpu() for layer in layers]),
            sequences=int(self._real.any(1).sum()),
            tokens=int(self._real.sum()),
        ).with_starts(self._starts())
        self.kept.offer(self._batch, self._large)

    def _starts(self) -> list[int] | None:
        """The ids that the sequences of the batch begin with; None: it has none."""
        ids = self._batch.get("input_ids")
        if ids is None or START not in self.host.roles:
            return None
        is_start = self._roles == self.host.roles.index(START)
        return ids[is_start.to(ids.device)].unique().tolist()

    def suspend(self) -> dict[str, Any]:
        return super().suspend() | {"_large": [tuple(large) for large in self._large]}

    def resume(self, known: Mapping[str, Any]) -> None:
        super().resume(known)
        self._large = [Large(*large) for large in known["_large"]]

    def state(self) -> dict[str, Any]:
        tally = {field.name: getattr(self.totals, field.name) for field in fields(self.totals)}
        return {"tally": tally, "kept": self.kept.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.totals = Tally(**state["tally"])
        self.kept.restore(state["kept"], input_device(self.host.model))

    def key(self, layer: int, channel: Tensor, role: Tensor, value: Tensor) -> Tensor:
        """(N,) int64: where (N,) values of a layer stand in the table."""
        return self.totals.key(layer, channel, role, len(self.host.roles), value)

    def result(self) -> Sites:
        return Sites.from_tally(self.totals, self.origin)

    def massive_keys(self) -> set[int]:
        """Where in the table the massive values stand: those that the sites count."""
        return massive_keys(self.totals, len(self.host.roles), self.result().widespread())


def floor_of(output: BlockOutput) -> Tensor:
    """(B,) the magnitude from which on the values of a sequence are kept."""
    return torch.minimum(
        output.threshold,
        torch.maximum(output.threshold / _FLOOR, _FLOOR_IN_MEDIANS * output.median),
    )
