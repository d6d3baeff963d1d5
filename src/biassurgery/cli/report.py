"""`biassurgery report`: everything on one page."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from biassurgery.cli import options as o
from biassurgery.cli.inputs import Inputs, prepare
from biassurgery.cli.output import about, header, show

_MOST = 8_192  # tokens of a text that are read where no limit is given
_LONGEST = 256  # of a window where no length is given: what varies is seen over many sequences

Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the page.")
]


@o.with_request
def report(
    request: o.Request,
    output: Output = Path("report.html"),
    min_magnitude: o.MinMagnitude = 100.0,
    min_ratio: o.MinRatio = 1000.0,
    json: o.Json = False,
) -> None:
    """Write one HTML page: a verdict, and every table and figure that it rests on."""
    from biassurgery.cli.measures import accuracy_of
    from biassurgery.reports.report import report

    inputs = prepare(request, most=_MOST, longest=_LONGEST)
    found_in, evaluated_on = _halves(inputs)
    page = report(
        inputs.host.root,
        found_in,
        output,
        tokenizer=inputs.tokenizer,
        evaluation=evaluated_on,
        evaluate=accuracy_of(inputs) if inputs.labelled else None,
        start=inputs.start,
        name=_title(inputs.model["name"]),
        source=inputs.source,
        command=shlex.join(["biassurgery", *sys.argv[1:]]),
        min_magnitude=min_magnitude,
        min_ratio=min_ratio,
    )
    show(json, header(inputs) | {"report": str(page)}, about(inputs), f"written to {page}")


def _title(name: str) -> str:
    """A model's name; of a folder its last part, for where it lies is nobody's business."""
    return Path(name).resolve().name if Path(name).exists() else name


def _halves(inputs: Inputs) -> tuple[Iterable[Any], Iterable[Any] | None]:
    """Of a text every other window to find in, and the rest to evaluate on; images are both."""
    import torch

    if not inputs.reads_text:
        return inputs.batches, None
    batches = list(inputs.batches)
    rows = torch.cat(batches)
    if len(rows) < 2:
        return batches, None
    size = len(batches[0])
    return rows[::2].split(size), rows[1::2].split(size)
