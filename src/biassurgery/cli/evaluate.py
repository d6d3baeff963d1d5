"""`biassurgery eval`: perplexity, accuracy or zero-shot tasks under interventions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biassurgery.cli import options as o
from biassurgery.cli.inputs import prepare
from biassurgery.cli.output import about, header, show

if TYPE_CHECKING:
    from biassurgery.cli.findings import Findings
    from biassurgery.cli.modes import Asked
    from biassurgery.findings.sites import Sites

_MODES = ("set_zero", "set_mean", "zero_random")
_MODES_OF_TASKS = ("set_zero", "set_mean")  # the paper's columns

Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Zero-shot tasks of lm-evaluation-harness, such as piqa,arc_easy (the eval extra).",
    ),
]
TaskPath = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="With task files of your own (YAML).")
]
Shots = Annotated[int, typer.Option("--num-fewshot", min=0, help="Examples before each question.")]


@o.with_request
def evaluate(
    request: o.Request,
    given: o.Given,
    mode: o.Modes = None,
    layers: o.LayersOption = "first",
    tasks: Tasks = None,
    task_path: TaskPath = None,
    num_fewshot: Shots = 0,
    checkpoint: o.Checkpoint = None,
    json: o.Json = False,
) -> None:
    """Compare perplexity of text, accuracy of labelled images, or tasks, under interventions."""
    from biassurgery.cli.findings import Findings
    from biassurgery.cli.measures import TaskOptions, measure_of
    from biassurgery.cli.modes import parse_layers, parse_mode
    from biassurgery.evaluate import compare

    asked = [parse_mode(spec) for spec in mode or (_MODES_OF_TASKS if tasks else _MODES)]
    where = parse_layers(layers)
    findings = Findings(given)
    chosen = TaskOptions.read(tasks, task_path, num_fewshot, request, checkpoint)
    inputs = prepare(request, "evaluation")
    measure = measure_of(inputs, asked, chosen, request)
    modes = [findings.mode(one, inputs, on_data=False) for one in asked]
    needed = any(one.needs_sites for one in asked)
    used = findings.get("sites", inputs, on_data=False) if needed else None
    handed: dict[str, Any] = {"start": inputs.start, "checkpoint": checkpoint}
    result = compare(inputs.host.root, measure, [None, *modes], sites=used, layers=where, **handed)
    document = header(inputs) | {
        "tasks": None if chosen is None else list(chosen.names),
        "sites": None if used is None else used.header(),
        "layers": where or "first",
        "results": [{"mode": row.label, **row.values} for row in result.rows],
    }
    places = _places(asked, findings, used, layers)
    show(json, document, about(inputs), *places, result)


def _places(
    asked: Sequence[Asked], findings: Findings, sites: Sites | None, layers: str
) -> list[str]:
    """What the modes are made from, and where they change the model: a line each."""
    needed = dict.fromkeys(one.needs[1] for one in asked if one.needs is not None)
    places = [f"{name}: {findings.source(name)}" for name in needed]
    if sites is not None:
        given = findings.source("sites", sites.origin.source)
        places.append(
            f"sites: {len(sites)} in layers {', '.join(map(str, sites.layers()))}, from {given};"
            f" changed: {layers}"
        )
    return places
