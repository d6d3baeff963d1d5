"""What a diagnosis confirms on one short sequence, in at most four forwards."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from biassurgery.adapters.registry import Host
from biassurgery.errors import UnsupportedModel
from biassurgery.findings.diagnosed import SinkUse, SuperWeight
from biassurgery.findings.sites import Sites
from biassurgery.measure.first_token import evictions, routed, shares_of, watches
from biassurgery.measure.short_text import losses, run, sequence_of, why_no_loss
from biassurgery.measure.super_weights import Writers, without
from biassurgery.surgery.attention import Attention
from biassurgery.surgery.edit import Place

ZEROED = 2  # super weights that are confirmed


class Confirmed(NamedTuple):
    """What the short sequence has shown; notes say what it could not."""

    super_weights: tuple[SuperWeight, ...]
    sinks: SinkUse | None
    notes: tuple[str, ...]


class Short:
    """The short sequence, and what can be measured on it.

    Args:
        host: the model.
        batch: whose first sequence is taken.

    Attributes:
        sequence: None: none can be taken out.
        attending: the attentions that are watched.
        reason: why the loss cannot be measured; empty: it can.
        notes: what the sequence cannot show.
    """

    def __init__(self, host: Host, batch: Mapping[str, Any]) -> None:
        self.host = host
        self.notes: list[str] = []
        self.sequence: dict[str, Any] | None = None
        self.attending: dict[int, Attention] = {}
        try:
            self.sequence = sequence_of(host, batch)
        except UnsupportedModel as error:
            self.notes.append(f"super weights and the first token: {error}")
            return
        try:
            self.attending = routed(host)
        except UnsupportedModel as error:
            self.notes.append(f"first token: {error}")
        self.watching = watches(self.attending)
        self.reason = why_no_loss(host, self.sequence)

    def evictions(self) -> list[Place]:
        """The edits by which the first token has gone for the second half of the sequence."""
        return evictions(self.attending, self._since)

    @property
    def _since(self) -> int:
        """The first of the losses behind the eviction; half of them are (T - 1)."""
        assert self.sequence is not None
        return next(iter(self.sequence.values())).shape[1] // 2

    def shown(
        self,
        weights: Sequence[SuperWeight],
        intact: Tensor | None = None,
        zeroed: Sequence[Tensor | None] = (),
        evicted: Tensor | None = None,
    ) -> Confirmed:
        """What follows.

        Args:
            weights: super weights, those that contribute most first.
            intact: (T - 1,) what the model pays for each token; None: it is not known.
            zeroed: the same without each of the first super weights.
            evicted: the same with the first token evicted; None: it was not measured.
        """
        if self.sequence is None:
            return Confirmed((), None, tuple(self.notes))
        reason = self.reason
        if intact is None and not reason:
            reason = f"{type(self.host.model).__name__} has no head"
        sinks = SinkUse(shares_of(self.watching), reason=reason) if self.attending else None
        if intact is not None:
            rises = [_rise(losses, intact) for losses in zeroed]
            measured = [replace(weight, loss=rise) for weight, rise in zip(weights, rises)]
            weights = [*measured, *weights[len(measured) :]]
            if sinks is not None and evicted is not None:
                sinks = replace(
                    sinks,
                    perplexity=_perplexity(intact[self._since :]),
                    evicted=_perplexity(evicted[self._since :]),
                    tokens=len(intact) - self._since,
                )
        return Confirmed(tuple(weights), sinks, tuple(self.notes))


def confirmed(
    host: Host, batch: Mapping[str, Any], sites: Sites, left_out: Collection[str] = ()
) -> Confirmed:
    """Look for super weights, confirm the first ones, and evict the first token.

    Args:
        host: the model.
        batch: whose first sequence is taken.
        sites: the massive activations.
        left_out: names of linear layers that read some tokens only.
    """
    short = Short(host, batch)
    sequence = short.sequence
    if sequence is None:
        return short.shown(())
    writers = Writers(host, sites, left_out)
    places = [*writers.places(), *short.watching]
    intact = None
    if short.reason:
        run(host, sequence, places)
    else:
        intact = losses(host, sequence, places)
    weights = writers.found(sequence)
    short.notes += dict.fromkeys(writers.notes)
    if intact is None:
        return short.shown(weights)
    zeroed = [losses(host, sequence, [without(host, weight)]) for weight in weights[:ZEROED]]
    evicted = losses(host, sequence, short.evictions()) if short.attending else None
    return short.shown(weights, intact, zeroed, evicted)


def _rise(losses: Tensor | None, intact: Tensor) -> float | None:
    """By how much the mean loss has risen; None: it is not finite."""
    assert losses is not None  # it has a head
    rise = (losses.mean() - intact.mean()).item()
    return rise if math.isfinite(rise) else None


def _perplexity(values: Tensor) -> float | None:
    """None: it is not finite."""
    mean = values.mean().item()
    return math.exp(mean) if mean < 700 else None
