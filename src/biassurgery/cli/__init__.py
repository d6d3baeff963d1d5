"""The command line: `biassurgery detect | calibrate | eval | list | demo`.

Exit codes: 0 done; 1 refused, with the reason on stderr; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from biassurgery.cli import options as o
from biassurgery.cli.inputs import Inputs, prepare
from biassurgery.cli.output import show
from biassurgery.errors import BadBatch, SurgeryError

_EXIT_CODES = (
    "Exit codes: 0 done; 1 refused, with the reason on stderr; 2 wrong usage; 130 interrupted."
)

_MOST = 32_768  # tokens that detect reads of a text where no limit is given

# What of a `Detection` goes into the JSON document, besides its sites.
_OF_DETECTION = (
    "layers",
    "roles",
    "positions",
    "grid",
    "outlier_features",
    "uniform_channels",
    "sequences",
    "tokens",
)


class _Group(TyperGroup):
    """Says refusals and warnings on stderr, in a line each."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except SurgeryError as error:
                typer.echo(f"error: {error}", err=True)
                raise typer.Exit(1) from error


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {message}", err=True)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=_EXIT_CODES,
    help="Find, fix and remove massive activations in trained transformers.",
)


def _print_version(asked: bool) -> None:
    if asked:
        from biassurgery import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


@app.command(epilog=_EXIT_CODES)
@o.with_request
def detect(
    request: o.Request,
    min_magnitude: o.MinMagnitude = 100.0,
    min_ratio: o.MinRatio = 1000.0,
    checkpoint: o.Checkpoint = None,
    json: o.Json = False,
) -> None:
    """Report magnitudes per layer, massive activations and the tokens that they are on."""
    from biassurgery.measure.detect import detect

    inputs = prepare(request, most=_MOST)
    detection = detect(
        inputs.host.root,
        inputs.batches,
        min_magnitude=min_magnitude,
        min_ratio=min_ratio,
        start=inputs.start,
        checkpoint=checkpoint,
        source=inputs.source,
    )
    parts = {name: getattr(detection, name) for name in _OF_DETECTION}
    document = _header(inputs) | detection.sites.header() | parts
    show(json, document, _about(inputs), detection)


@app.command(epilog=_EXIT_CODES)
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
    document = _header(inputs) | measured.header() | {"saved": saved}
    show(json, document, _about(inputs), measured, *lines)


@app.command(name="eval", epilog=_EXIT_CODES)
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
    measure = _measure(inputs)
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
    document = _header(inputs) | {
        "sites": used.header(),
        "layers": where,
        "results": [{"mode": row.label, **row.values} for row in result.rows],
    }
    show(json, document, _about(inputs), places, result)


def _measure(inputs: Inputs) -> Callable[..., dict[str, float]]:
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


@app.command(name="list", epilog=_EXIT_CODES)
def list_known(json: o.Json = False) -> None:
    """List architectures, modes, and checkpoints with published sites."""
    from biassurgery.adapters.registry import adapters
    from biassurgery.cli.listing import listing_tables
    from biassurgery.findings.published import published_runs
    from biassurgery.modes import MODES

    families = {adapter.family: adapter.modality for adapter in reversed(adapters())}
    modes = {name: (mode.__doc__ or "").split("\n\n")[0] for name, mode in MODES.items()}
    published = {
        run.checkpoint: f"layers {run.layers[0]} to {run.layers[-1]}" if run.layers else "none"
        for run in published_runs()
        if run.bos == run.bos_by_default
    }
    show(
        json,
        {"families": families, "modes": modes, "published": published},
        listing_tables(families, modes, published),
    )


@app.command(epilog=_EXIT_CODES)
def demo(json: o.Json = False) -> None:
    """Show the paper's central result on the packaged model: find, fix, remove."""
    from biassurgery.cli.demo import run_demo

    result = run_demo()
    document = {
        "about": result.about.splitlines(),
        "layers": result.detection.layers,
        "sites": result.detection.sites.header(),
        "results": [{"mode": row.label, **row.values} for row in result.comparison.rows],
    }
    show(json, document, result.about, result.detection, result.comparison)


def _header(inputs: Inputs) -> dict[str, Any]:
    return {"model": inputs.model, "data": inputs.data}


def _about(inputs: Inputs) -> str:
    model = inputs.model
    return (
        f"model: {model['name']}, {model['architecture']}, {model['blocks']} blocks of width"
        f" {model['width']}, {model['dtype']} on {model['device']}\ndata: {inputs.source}\n"
    )
