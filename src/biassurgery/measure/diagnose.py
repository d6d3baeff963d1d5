"""One pass over data, and at most five forwards on a short text: what breaks in a model, and why.

The public function is `biassurgery.diagnose`, which can also measure remedies.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from biassurgery.adapters.linears import stacked_experts
from biassurgery.adapters.registry import Tower, find_host
from biassurgery.data.batches import Batch, as_batches
from biassurgery.data.start import Start, behind_start, start_id
from biassurgery.errors import BadBatch, BadOption
from biassurgery.findings.diagnosed import Float16, Inside, LinearRange
from biassurgery.findings.diagnosis import Diagnosis
from biassurgery.findings.sites import Sites
from biassurgery.measure.by_blocks import ByBlocks, Onload, by_blocks
from biassurgery.measure.calibrate import check_measurable
from biassurgery.measure.candidates import Candidates
from biassurgery.measure.confirm import confirm
from biassurgery.measure.confirmed import Confirmed, confirmed
from biassurgery.measure.confirmed_by_blocks import confirmed_by_blocks
from biassurgery.measure.linears import LinearRanges
from biassurgery.measure.massive import MassiveActivations
from biassurgery.measure.one_pass import Pass
from biassurgery.measure.together import together

_INSIDE = 8  # largest values inside branches that are kept


def diagnosed(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    start: Start = None,
    tokenizer: Any = None,
    min_magnitude: float = 100.0,
    min_ratio: float = 1000.0,
    onload: Onload = None,
    spill: str | Path | None = None,
    source: str = "",
    progress: bool | None = None,
    tower: Tower | None = None,
) -> Diagnosis:
    """The diagnosis of a model, without measured remedies; see `biassurgery.diagnose`."""
    with together("diagnose", model):
        host = find_host(model, tower)
        check_measurable(host, min_magnitude, min_ratio)
        if tokenizer is not None and not hasattr(tokenizer, "convert_ids_to_tokens"):
            raise BadOption(
                f"tokenizer: {type(tokenizer).__name__} has no convert_ids_to_tokens(); pass the"
                " model's own tokenizer of transformers, or None."
            )
        front = start_id(host, start, tokenizer)
        blocks = by_blocks(host, onload, spill)
        massive = MassiveActivations(host, min_magnitude, min_ratio, source, front)
        ranges = LinearRanges(host, Candidates(massive), tokenizer)
        one_pass = Pass(host, min_magnitude, min_ratio, [massive, ranges])
        checked = behind_start(host, as_batches(host, batches), front)
        one_pass.read(checked, "diagnosing", progress, given=batches, start=front, blocks=blocks)
        one_pass.warn_of_left_out()
        tally = massive.totals
        if host.adapter.modality == "text" and tally.tokens <= tally.sequences:
            raise BadBatch(
                f"batches: the {tally.sequences} sequences have one token each, so there is nothing"
                " to compare start tokens with; give sequences of 64 tokens or more."
            )
        return _diagnosis(massive, ranges, _shown(massive, ranges, blocks))


def _shown(massive: MassiveActivations, ranges: LinearRanges, blocks: ByBlocks | None) -> Confirmed:
    """Confirm the sites, and what a short sequence shows."""
    if blocks is not None:
        return confirmed_by_blocks(blocks, massive, ranges.unplaced)
    host = massive.host
    confirm(host, massive)
    assert massive.kept.batch is not None  # every pass keeps rows
    return confirmed(host, massive.kept.batch, massive.result(), ranges.unplaced)


def _diagnosis(massive: MassiveActivations, ranges: LinearRanges, shown: Confirmed) -> Diagnosis:
    """What has been counted, with what a short sequence has shown."""
    host = massive.host
    sites = massive.result()
    linears = ranges.result()
    return Diagnosis(
        linears,
        shown.super_weights,
        Float16(dict(sorted(ranges.residual.items())), _inside(linears)),
        shown.sinks,
        Sites(sites, origin=sites.origin),
        ranges.carriers(),
        massive.totals.sequences,
        massive.totals.tokens,
        host.adapter.modality,
        not_told=tuple(sorted({*ranges.unplaced, *stacked_experts(host)})),
        notes=shown.notes,
    )


def _inside(linears: Iterable[LinearRange]) -> tuple[Inside, ...]:
    """The largest values inside branches, the largest first."""
    found = [
        Inside(linear.name, what, value)
        for linear in linears
        for what, value in (("reads", linear.largest), ("returns", linear.returned))
    ]
    return tuple(sorted(found, key=lambda part: -part.largest)[:_INSIDE])
