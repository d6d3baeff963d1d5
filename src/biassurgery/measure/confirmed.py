"""What a diagnosis confirms on one short sequence, in at most four forwards."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
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

ZEROED = 2  # super weights that are confirmed


class Confirmed(NamedTuple):
    """What the short sequence has shown; notes say what it could not."""

    super_weights: tuple[SuperWeight, ...]
    sinks: SinkUse | None
    notes: tuple[str, ...]


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
    notes: list[str] = []
    attending: dict[int, Attention] = {}
    try:
        sequence = sequence_of(host, batch)
    except UnsupportedModel as error:
        return Confirmed((), None, (f"super weights and the first token: {error}",))
    try:
        attending = routed(host)
    except UnsupportedModel as error:
        notes.append(f"first token: {error}")
    writers = Writers(host, sites, left_out)
    watching = watches(attending)
    places = [*writers.places(), *watching]
    reason = why_no_loss(host, sequence)
    intact = None
    if reason:
        run(host, sequence, places)
    else:
        intact = losses(host, sequence, places)
        reason = "" if intact is not None else f"{type(host.model).__name__} has no head"
    weights = writers.found(sequence)
    notes += dict.fromkeys(writers.notes)
    sinks = SinkUse(shares_of(watching), reason=reason) if attending else None
    if intact is not None:
        weights = _with_losses(host, sequence, weights, intact)
        sinks = None if sinks is None else _evicted(host, sequence, attending, sinks, intact)
    return Confirmed(tuple(weights), sinks, tuple(notes))


def _evicted(
    host: Host,
    sequence: Mapping[str, Any],
    attending: dict[int, Attention],
    sinks: SinkUse,
    intact: Tensor,
) -> SinkUse:
    """With what the second half of the sequence costs when its first token has gone by then."""
    since = (len(intact) + 1) // 2
    evicted = losses(host, sequence, evictions(attending, since))
    assert evicted is not None  # it has a head
    return replace(
        sinks,
        perplexity=_perplexity(intact[since:]),
        evicted=_perplexity(evicted[since:]),
        tokens=len(intact) - since,
    )


def _with_losses(
    host: Host, sequence: Mapping[str, Any], weights: list[SuperWeight], intact: Tensor
) -> list[SuperWeight]:
    """The weights, the first ones with what the loss rises by without them."""
    measured = []
    for weight in weights[:ZEROED]:
        zeroed = losses(host, sequence, [without(host, weight)])
        assert zeroed is not None  # it has a head
        rise = (zeroed.mean() - intact.mean()).item()
        measured.append(replace(weight, loss=rise if math.isfinite(rise) else None))
    return [*measured, *weights[ZEROED:]]


def _perplexity(values: Tensor) -> float | None:
    """None: it is not finite."""
    mean = values.mean().item()
    return math.exp(mean) if mean < 700 else None
