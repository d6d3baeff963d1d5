"""One run under the patch that `layers="first"` stands for: does it leave nothing massive?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from biassurgery.adapters.registry import Host
from biassurgery.errors import NonFiniteActivation, warn
from biassurgery.findings.sites import Sites
from biassurgery.findings.tally import Tally
from biassurgery.measure.massive import MassiveActivations
from biassurgery.measure.one_pass import Pass
from biassurgery.measure.statistic import BlockOutput, Statistic
from biassurgery.surgery.block import BlockEdit
from biassurgery.surgery.edit import Place


def confirm(host: Host, massive: MassiveActivations) -> None:
    """Run the kept sequences with massive values set to zero, and add to the totals what is left.

    A model computes something else without its massive values, so it may make them again where
    they did not grow before. What is left at a site is zeroed there and then, so that one run finds
    all such places, as the blocks run.
    """
    confirmation = confirmation_of(host, massive)
    if confirmation is None:
        return
    try:
        confirmation.one_pass.read([confirmation.batch], "confirming", progress=False)
    except NonFiniteActivation:
        warn_of_overflow()
        return
    massive.totals = confirmation.totals()


class Confirmation:
    """That run.

    Attributes:
        batch: the kept sequences.
        one_pass: watches it.
    """

    def __init__(self, host: Host, massive: MassiveActivations, batch: dict[str, Any]) -> None:
        origin = massive.origin
        self.massive = massive
        self.batch = batch
        self._left = _Left(host, massive.result())
        self.one_pass = Pass(
            host, origin.min_magnitude or 0.0, origin.min_ratio or 0.0, [self._left]
        )

    def totals(self) -> Tally:
        """The totals with what is left at the blocks that have run."""
        totals = self.massive.totals
        for layer, channels, least in self._left.found:
            end = torch.full_like(channels, layer)
            totals = totals.with_growth(channels, end, end, least)
        return totals


def confirmation_of(host: Host, massive: MassiveActivations) -> Confirmation | None:
    """The run that is to confirm what has been found; None: there is nothing to confirm."""
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    batch = massive.kept.batch
    if batch is None or not (len(massive.result()) or ranks):  # sharded, all ranks have to run
        return None
    return Confirmation(host, massive, batch)


def warn_of_overflow() -> None:
    """Say what follows where that run is not finite."""
    warn(
        "sites: with its massive values set to zero the model's hidden states are not finite,"
        " so layers='first' goes by how the values grow without a patch; set_zero needs"
        " bfloat16 or float32.",
    )


class _Zeroed(BlockEdit):
    """Zeroes what leaves a block where `mask` (B, T, C) says so in some channels (C,)."""

    at = "exit"  # behind the observer, whose findings it follows
    channels: Tensor
    mask: Tensor

    def forward(self, hidden: Tensor, start: int | Tensor = 0) -> Tensor:
        x = hidden.index_select(-1, self.channels)
        return hidden.index_copy(-1, self.channels, x.masked_fill(self.mask, 0))


class _Left(Statistic):
    """What meets the definition under the patch; at the sites, it is zeroed as it is found.

    Attributes:
        found: a layer, channels (C,) int64 of it and the smallest such magnitude (C,) float64; of
            channels with sites and of others.
    """

    in_batch = ()

    def __init__(self, host: Host, sites: Sites) -> None:
        super().__init__(host)
        self.found: list[tuple[int, Tensor, Tensor]] = []
        self.sites = {
            layer: sorted({(s.channel, s.gate or 0.0, bool(s.first)) for s in sites.at(layer)})
            for layer in sites.layers()
        }
        # What leaves the last block is read by no other, and a token that was added is gone there.
        last = len(host.blocks) - 1
        self.edits = {layer: _Zeroed() for layer in self.sites if layer != last}

    def places(self) -> list[Place]:
        return [Place(layer, self.host.blocks[layer], edit) for layer, edit in self.edits.items()]

    def see(self, output: BlockOutput) -> None:
        self._elsewhere(output)
        if output.layer not in self.sites:
            return
        device = output.hidden.device
        channels, gates, first = (
            torch.tensor(column, device=device) for column in zip(*self.sites[output.layer])
        )
        magnitude = output.magnitude.index_select(-1, channels).float()
        massive = magnitude > gates
        meets = magnitude > output.threshold[:, None, None]
        left = meets & ~(massive & first)
        found = left.any(1).any(0)
        edit = self.edits.get(output.layer)
        if edit is not None:
            edit.channels = channels
            edit.mask = left | massive & (first | found)
        least = magnitude.masked_fill(~left, torch.inf).amin((0, 1))
        self.found.append((output.layer, channels[found].cpu(), least[found].double().cpu()))

    def _elsewhere(self, output: BlockOutput) -> None:
        """Channels without a site: the patch has no level for them, so it is only told."""
        channels, meets = output.massive
        with_site = {channel for channel, _, _ in self.sites.get(output.layer, ())}
        without = [i for i, channel in enumerate(channels.tolist()) if channel not in with_site]
        if without:
            magnitude = output.magnitude[..., channels[without]].float()
            least = magnitude.masked_fill(~meets[..., without], torch.inf).amin((0, 1))
            self.found.append((output.layer, channels[without].cpu(), least.double().cpu()))

    def result(self) -> list[tuple[int, Tensor, Tensor]]:
        return self.found
