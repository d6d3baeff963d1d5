"""`biassurgery detect`: magnitudes per layer, massive activations, and where they are."""

from __future__ import annotations

from dataclasses import asdict

from biassurgery.cli import options as o
from biassurgery.cli.inputs import prepare
from biassurgery.cli.onloading import Onloading
from biassurgery.cli.output import about, header, show

MOST = 32_768  # tokens that are read of a text where no limit is given

# What of a `Detection` goes into the JSON document, besides its sites and sinks.
_OF_DETECTION = (
    "summary",
    "standing_out",
    "layers",
    "roles",
    "positions",
    "grid",
    "outlier_features",
    "uniform_channels",
    "sequences",
    "tokens",
    "no_sinks",
    "not_placed",
)


@o.with_request
def detect(
    request: o.Request,
    onloading: Onloading,
    min_magnitude: o.MinMagnitude = 100.0,
    min_ratio: o.MinRatio = 1000.0,
    checkpoint: o.Checkpoint = None,
    json: o.Json = False,
) -> None:
    """Report magnitudes per layer, massive activations and the tokens that they are on."""
    from biassurgery.measure.detect import detect

    inputs = prepare(request, most=MOST, onloading=onloading)
    detection = detect(
        inputs.host.root,
        inputs.batches,
        min_magnitude=min_magnitude,
        min_ratio=min_ratio,
        tokenizer=inputs.tokenizer,
        start=inputs.start,
        checkpoint=checkpoint,
        source=inputs.source,
        **onloading.options,
    )
    parts = {name: getattr(detection, name) for name in _OF_DETECTION}
    sinks = None
    if detection.sinks is not None:
        sinks = {"metric": detection.sinks.metric, **asdict(detection.sinks)}
    document = header(inputs) | detection.sites.header() | parts | {"sinks": sinks}
    show(json, document, about(inputs), detection)
