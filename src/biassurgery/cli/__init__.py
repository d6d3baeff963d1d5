"""The command line: `biassurgery detect | calibrate | eval | list | demo`.

Exit codes: 0 done; 1 refused, with the reason on stderr; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from biassurgery.cli import options as o
from biassurgery.cli.inputs import Inputs, Request, prepare
from biassurgery.cli.output import show
from biassurgery.errors import BadBatch, SurgeryError

_EXIT_CODES = (
    "Exit codes: 0 done; 1 refused, with the reason on stderr; 2 wrong usage; 130 interrupted."
)


class _Group(TyperGroup):
    """Says refusals and warnings on stderr, in a line each."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: typer.echo(
                f"warning: {message}", err=True
            )
            try:
                return super().invoke(ctx)
            except SurgeryError as error:
                typer.echo(f"error: {error}", err=True)
                raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=_EXIT_CODES,
    help="Find, fix and remove massive activations in trained transformers.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
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
def detect(
    model: o.ModelName,
    text: o.Texts = None,
    images: o.Images = None,
    weights: o.Weights = None,
    length: o.Length = None,
    bos: o.BosOption = o.Bos.auto,
    batch_size: o.BatchSize = 8,
    limit: o.Limit = None,
    split: o.SplitOption = o.Split.all,
    min_magnitude: o.MinMagnitude = 100.0,
    min_ratio: o.MinRatio = 1000.0,
    dtype: o.DtypeOption = None,
    device: o.Device = None,
    json: o.Json = False,
) -> None:
    """Report magnitudes per layer, massive activations and the tokens that they are on."""
    from biassurgery.measure.detect import detect

    inputs = prepare(
        Request(model, text, images, weights, length, bos, batch_size, limit, split, dtype, device)
    )
    found = detect(
        inputs.host.root,
        inputs.batches,
        min_magnitude=min_magnitude,
        min_ratio=min_ratio,
        source=inputs.source,
    )
    document = (
        _header(inputs)
        | found.sites.header()
        | {
            name: getattr(found, name)
            for name in (
                "layers",
                "roles",
                "positions",
                "grid",
                "outlier_features",
                "uniform_channels",
                "sequences",
                "tokens",
            )
        }
    )
    show(json, document, _about(inputs), found)


@app.command(epilog=_EXIT_CODES)
def calibrate(
    model: o.ModelName,
    text: o.Texts = None,
    images: o.Images = None,
    weights: o.Weights = None,
    sites: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to save them (safetensors).")
    ] = None,
    length: o.Length = None,
    bos: o.BosOption = o.Bos.auto,
    batch_size: o.BatchSize = 8,
    limit: o.Limit = None,
    split: o.SplitOption = o.Split.all,
    min_magnitude: o.MinMagnitude = 100.0,
    min_ratio: o.MinRatio = 1000.0,
    dtype: o.DtypeOption = None,
    device: o.Device = None,
    json: o.Json = False,
) -> None:
    """Measure the mean of every massive activation, and save it for eval."""
    from biassurgery.measure.calibrate import calibrate

    inputs = prepare(
        Request(model, text, images, weights, length, bos, batch_size, limit, split, dtype, device)
    )
    found = calibrate(
        inputs.host.root,
        inputs.batches,
        min_magnitude=min_magnitude,
        min_ratio=min_ratio,
        source=inputs.source,
    )
    if sites is not None:
        found.save(sites)
    saved = None if sites is None else str(sites)
    lines = (f"saved to {saved}",) if saved else ()
    show(json, _header(inputs) | found.header() | {"saved": saved}, _about(inputs), found, *lines)


@app.command(name="eval", epilog=_EXIT_CODES)
def evaluate(
    model: o.ModelName,
    text: o.Texts = None,
    images: o.Images = None,
    weights: o.Weights = None,
    sites: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="From calibrate. Default: published sites of the checkpoint, "
            "else a calibration on packaged data.",
        ),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODE",
            help="May be repeated; with options as in set_value:value=5. "
            "Default: set_zero, set_mean, zero_random.",
        ),
    ] = None,
    layers: Annotated[str, typer.Option(help="first, all, or indices such as 2,5.")] = "first",
    length: o.Length = None,
    bos: o.BosOption = o.Bos.auto,
    batch_size: o.BatchSize = 8,
    limit: o.Limit = None,
    split: o.SplitOption = o.Split.all,
    dtype: o.DtypeOption = None,
    device: o.Device = None,
    json: o.Json = False,
) -> None:
    """Compare the model with and without interventions: perplexity of text, top-1 accuracy of
    labelled images.
    """
    from biassurgery.cli.modes import parse_layers, parse_mode
    from biassurgery.evaluate import compare, perplexity, top1_accuracy
    from biassurgery.findings.sites import Sites
    from biassurgery.modes.defaults import default_sites

    chosen = [parse_mode(spec) for spec in mode or ("set_zero", "set_mean", "zero_random")]
    where = parse_layers(layers)
    given = None if sites is None else Sites.load(sites)
    inputs = prepare(
        Request(model, text, images, weights, length, bos, batch_size, limit, split, dtype, device),
        "evaluation",
    )
    if not inputs.reads_text and not inputs.labelled:
        raise BadBatch(
            "images: top-1 accuracy needs labels; give --images with labels.csv (columns file,"
            " class_index), or with one sub-folder for each of the model's"
            f" {getattr(inputs.host.model, 'num_classes', '')} classes."
        )

    def measure(host: Any) -> dict[str, float]:
        if not inputs.reads_text:
            return {"top1": top1_accuracy(host, inputs.batches)}
        value = perplexity(host, inputs.batches)
        return {"perplexity": value, "loss": math.log(value)}

    used = default_sites(inputs.host.root, inputs.host) if given is None else given
    result = compare(inputs.host.root, measure, [None, *chosen], sites=used, layers=where)
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
