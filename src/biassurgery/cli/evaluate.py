"""`biassurgery eval`: perplexity or accuracy under interventions."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from biassurgery.cli import options as o
from biassurgery.cli.inputs import Inputs, prepare
from biassurgery.cli.output import about, header, show
from biassurgery.errors import BadBatch


@o.with_request
def evaluate(
    request: o.Request,
    sites: o.SitesToUse = None,
    mode: o.Modes = None,
    layers: o.LayersOption = "first",
    checkpoint: o.Checkpoint = None,
    json: o.Json = False,
) -> None:
    """Compare perplexity of text, or top-1 accuracy of labelled images, under interventions."""
    from biassurgery.cli.modes import parse_layers, parse_mode
    from biassurgery.evaluate import compare
    from biassurgery.findings.sites import Sites
    from biassurgery.modes.defaults import default_sites

    chosen = [parse_mode(spec) for spec in mode or ("set_zero", "set_mean", "zero_random")]
    where = parse_layers(layers)
    loaded = None if sites is None else Sites.load(sites)
    inputs = prepare(request, "evaluation")
    measure = measure_of(inputs)
    used = default_sites(inputs.host.root, inputs.host, inputs.start) if loaded is None else loaded
    result = compare(
        inputs.host.root,
        measure,
        [None, *chosen],
        sites=used,
        layers=where,
        start=inputs.start,
        checkpoint=checkpoint,
    )
    places = (
        f"sites: {len(used)} in layers {', '.join(map(str, used.layers()))}, from"
        f" {sites or used.origin.source}; changed: {layers}"
    )
    document = header(inputs) | {
        "sites": used.header(),
        "layers": where,
        "results": [{"mode": row.label, **row.values} for row in result.rows],
    }
    show(json, document, about(inputs), places, result)


def measure_of(inputs: Inputs) -> Callable[..., dict[str, float]]:
    """What is evaluated: the perplexity of text, or the top-1 accuracy of labelled images."""
    from biassurgery.evaluate import perplexity, top1_accuracy

    if not inputs.reads_text and not inputs.labelled:
        raise BadBatch(
            "images: top-1 accuracy needs labels; give --images with labels.csv (columns file,"
            " class_index), or with one sub-folder for each of the model's"
            f" {getattr(inputs.host.model, 'num_classes', '')} classes."
        )

    def measure(
        model: Any, checkpoint: Path | None = None, start: int | None = None
    ) -> dict[str, float]:
        if not inputs.reads_text:
            return {"top1": top1_accuracy(model, inputs.batches, checkpoint=checkpoint)}
        value = perplexity(model, inputs.batches, start=start, checkpoint=checkpoint)
        return {"perplexity": value, "loss": math.log(value)}

    return measure
