"""What a diagnosis confirms, block by block: all of its forwards in one reading of the weights.

The run that says what `layers="first"` leaves comes first at each block, for the search for super
weights looks where values are born or left. The first weights in the end are not known before the
last block; so of those that have been found so far, each time, the first ones go on without.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

from biassurgery.adapters.arguments import call
from biassurgery.adapters.registry import Host
from biassurgery.errors import NonFiniteActivation
from biassurgery.findings.diagnosed import SuperWeight
from biassurgery.findings.sites import Sites
from biassurgery.measure.by_blocks import ByBlocks
from biassurgery.measure.confirm import Confirmation, confirmation_of, warn_of_overflow
from biassurgery.measure.confirmed import ZEROED, Confirmed, Short
from biassurgery.measure.forwards import Forward
from biassurgery.measure.massive import MassiveActivations
from biassurgery.measure.short_text import losses_in
from biassurgery.measure.super_weights import Writers, without


def confirmed_by_blocks(
    blocks: ByBlocks, massive: MassiveActivations, left_out: Collection[str]
) -> Confirmed:
    """`confirm` and `confirmed` at once.

    Args:
        blocks: of the model.
        massive: gets what is left under the patch, see `confirm`.
        left_out: names of linear layers that read some tokens only.
    """
    confirmation = confirmation_of(blocks.host, massive)
    if confirmation is not None:
        try:
            shown = _confirmed(blocks, massive, left_out, confirmation)
        except NonFiniteActivation:
            warn_of_overflow()
        else:
            massive.totals = confirmation.totals()
            return shown
    return _confirmed(blocks, massive, left_out, None)


def _confirmed(
    blocks: ByBlocks,
    massive: MassiveActivations,
    left_out: Collection[str],
    confirmation: Confirmation | None,
) -> Confirmed:
    """In one reading, with the run that confirms the sites or without."""

    def sites() -> Sites:
        totals = massive.totals if confirmation is None else confirmation.totals()
        return Sites.from_tally(totals, massive.origin)

    assert massive.kept.batch is not None  # every pass keeps rows
    short = Short(blocks.host, massive.kept.batch)
    forwards = None if short.sequence is None else _Forwards(blocks.host, short, left_out, sites)
    beside = None if forwards is None else forwards.through
    if confirmation is not None:
        batch = [confirmation.batch]
        blocks.read(confirmation.one_pass, batch, "confirming", False, beside=beside)
    elif beside is not None:
        blocks.sweep(beside)
    return short.shown(()) if forwards is None else forwards.shown()


class _Forwards:
    """The forwards of the short sequence.

    Args:
        host: the model.
        short: the sequence.
        left_out: names of linear layers that read some tokens only.
        sites: gives the massive activations, as far as the blocks have run.
    """

    def __init__(
        self, host: Host, short: Short, left_out: Collection[str], sites: Callable[[], Sites]
    ) -> None:
        assert short.sequence is not None  # there is something to run
        self.host = host
        self.short = short
        self.sequence = short.sequence
        self.left_out = left_out
        self.sites = sites
        run = partial(call, host.model, host.adapter.inputs(host.model, self.sequence))
        if short.reason:
            run = partial(host.adapter.run, host.model, self.sequence)
        self.intact = Forward(host, run, short.watching)
        self.evicted = None
        if short.attending and not short.reason:
            self.evicted = Forward(host, run, short.evictions())
        self.weights: list[SuperWeight] = []
        self.zeroed: dict[str, Forward] = {}

    def through(self, layer: int) -> None:
        """Let all of them go through one block, whose weights are there."""
        sites = [site for site in self.sites() if site.layer == layer]
        writers = Writers(self.host, sites, self.left_out)
        self.intact.places = [*self.short.watching, *writers.places()]
        self.intact.through(layer)
        if self.evicted is not None:
            self.evicted.through(layer)
        for forward in self.zeroed.values():
            forward.through(layer)
        self._add(layer, writers.found(self.sequence))
        self.short.notes += dict.fromkeys(writers.notes)

    def _add(self, layer: int, found: list[SuperWeight]) -> None:
        """Let the sequence go on without the weights that are now among the first."""
        self.weights = sorted([*self.weights, *found], key=lambda w: -abs(w.contribution))
        if self.short.reason:
            return
        first = self.weights[:ZEROED]
        self.zeroed = {
            weight.place: self.zeroed.get(weight.place) or self._without(layer, weight)
            for weight in first
        }

    def _without(self, layer: int, weight: SuperWeight) -> Forward:
        """The forward without a weight of this block: up to there it is the intact one."""
        forward = self.intact.branch([without(self.host, weight)])
        forward.through(layer)
        return forward

    def shown(self) -> Confirmed:
        """What they have shown, when they have been through all blocks."""
        if self.short.reason:
            return self.short.shown(self.weights)

        intact, evicted, *zeroed = (
            None if forward is None else losses_in(self.host, self.sequence, forward.output)
            for forward in (self.intact, self.evicted, *self.zeroed.values())
        )
        return self.short.shown(self.weights, intact, zeroed, evicted)
