"""`biassurgery calibrate`: the mean of every massive activation, as a file for `eval`."""

from __future__ import annotations

from biassurgery.cli import options as o
from biassurgery.cli.inputs import prepare
from biassurgery.cli.output import about, header, show


@o.with_request
def calibrate(
    request: o.Request,
    sites: o.SitesToSave = None,
    min_magnitude: o.MinMagnitude = 100.0,
    min_ratio: o.MinRatio = 1000.0,
    checkpoint: o.Checkpoint = None,
    json: o.Json = False,
) -> None:
    """Measure the mean of every massive activation, and save it for eval."""
    from biassurgery.measure.calibrate import calibrate

    inputs = prepare(request)
    measured = calibrate(
        inputs.host.root,
        inputs.batches,
        min_magnitude=min_magnitude,
        min_ratio=min_ratio,
        start=inputs.start,
        checkpoint=checkpoint,
        source=inputs.source,
    )
    if sites is not None:
        measured.save(sites)
    saved = None if sites is None else str(sites)
    lines = (f"saved to {saved}",) if saved else ()
    document = header(inputs) | measured.header() | {"saved": saved}
    show(json, document, about(inputs), measured, *lines)
