"""`biassurgery diagnose`: what breaks under int8, float16 and eviction, and what to do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biassurgery.cli import options as o
from biassurgery.cli.inputs import prepare
from biassurgery.cli.onloading import Onloading
from biassurgery.cli.output import about, header, show

if TYPE_CHECKING:
    from biassurgery.findings.diagnosis import Diagnosis

Save = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Where to save the diagnosis (safetensors)."),
]
Ratio = Annotated[
    float,
    typer.Option(
        min=1,
        help="List the linear layers whose largest input is this many times that of other tokens.",
    ),
]


@o.with_request
def diagnose(
    request: o.Request,
    onloading: Onloading,
    ratio: Ratio = 10.0,
    save: Save = None,
    min_magnitude: o.MinMagnitude = 100.0,
    min_ratio: o.MinRatio = 1000.0,
    json: o.Json = False,
) -> None:
    """Say what breaks in a model under int8, float16 and eviction, and what to do about it."""
    from biassurgery.evaluate.diagnose import diagnose

    inputs = prepare(request, onloading=onloading)
    found = diagnose(
        inputs.host.root,
        inputs.batches,
        start=inputs.start,
        tokenizer=inputs.tokenizer,
        min_magnitude=min_magnitude,
        min_ratio=min_ratio,
        source=inputs.source,
        **onloading.options,
    )
    if save is not None:
        found.save(save)
    ignored = found.ignore(ratio)
    document = header(inputs) | _document(found, ignored)
    document["saved"] = None if save is None else str(save)
    lines = [f"linear layers at ratio {ratio:g} or more:", *(ignored or ["none"])]
    lines += [] if save is None else [f"saved to {save}"]
    show(json, document, about(inputs), found, "\n".join(lines))


def _document(found: Diagnosis, ignored: list[str]) -> dict[str, Any]:
    """All that the text shows, and the numbers that it is made from."""
    return {
        "verdict": found.verdict,
        "advice": found.advice,
        "ignore": ignored,
        "linears": [asdict(linear) | {"ratio": linear.ratio} for linear in found.linears],
        "super_weights": [asdict(weight) for weight in found.super_weights],
        "float16": found.float16.to_json()
        | {name: getattr(found.float16, name) for name in ("largest", "overflows", "factor")},
        "sinks": None if found.sinks is None else found.sinks.to_json(),
        "sites": [asdict(site) for site in found.sites],
        "carriers": found.carriers,
        "tokens": found.tokens,
        "not_told": found.not_told,
        "notes": found.notes,
    }
