"""`biassurgery calibrate`: the mean of every massive activation, as a file for `eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from biassurgery.cli import options as o
from biassurgery.cli.inputs import Inputs, prepare
from biassurgery.cli.onloading import Onloading
from biassurgery.cli.output import about, header, show

if TYPE_CHECKING:
    from biassurgery.findings.sites import Sites


@o.with_request
def calibrate(
    request: o.Request,
    onloading: Onloading,
    sites: o.SitesToSave = None,
    key_values: o.KeyValuesToSave = None,
    means: o.MeansToSave = None,
    min_magnitude: o.MinMagnitude = 100.0,
    min_ratio: o.MinRatio = 1000.0,
    checkpoint: o.Checkpoint = None,
    json: o.Json = False,
) -> None:
    """Measure the mean of every massive activation, and save it for eval."""
    from biassurgery.measure.calibrate import calibrate

    inputs = prepare(request, onloading=onloading)
    measured = calibrate(
        inputs.host.root,
        inputs.batches,
        min_magnitude=min_magnitude,
        min_ratio=min_ratio,
        start=inputs.start,
        checkpoint=checkpoint,
        source=inputs.source,
        **onloading.options,
    )
    files = {"sites": sites, "key_values": key_values, "means": means}
    saved = _saved(files, measured, inputs, onloading)
    lines = [f"{name} saved to {path}" for name, path in saved.items() if path is not None]
    document = header(inputs) | measured.header() | {"saved": saved["sites"], "files": saved}
    show(json, document, about(inputs), measured, *lines)


def _saved(
    files: dict[str, Path | None], sites: Sites, inputs: Inputs, onloading: Onloading
) -> dict[str, str | None]:
    """Write every finding that has a file, measured on the same data; where each is."""
    from biassurgery.cli.findings import measured

    for name, path in files.items():
        if path is not None:
            given = onloading.options if name == "key_values" else {}
            finding = sites if name == "sites" else measured(name, inputs, inputs.batches, **given)
            finding.save(path)
    return {name: None if path is None else str(path) for name, path in files.items()}
