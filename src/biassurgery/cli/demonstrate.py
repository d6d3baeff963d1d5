"""`biassurgery demo`: the paper's central results, printed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from biassurgery.cli import options as o
from biassurgery.cli.fetch import AcceptTerms, tell
from biassurgery.cli.output import show
from biassurgery.evaluate import Comparison

ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="smollm2|gemma3",
        help="A real language model, fetched once. Default: the packaged checkpoint.",
    ),
]


def demo(model: ModelName = None, accept_terms: AcceptTerms = False, json: o.Json = False) -> None:
    """Show the paper's central results on the packaged model, or on a real one."""
    if model is None:
        _packaged(json)
    else:
        _real(model, accept_terms, json)


def _packaged(json: bool) -> None:
    from biassurgery.cli.demo import run_demo

    result = run_demo()
    document = {
        "about": result.about.splitlines(),
        "layers": result.detection.layers,
        "sites": result.detection.sites.header(),
        "results": _results(result.comparison),
    }
    show(json, document, result.about, result.detection, result.comparison)


def _real(name: str, accept_terms: bool, json: bool) -> None:
    from biassurgery.cli.demo_real import run_real_demo, sinks_table
    from biassurgery.data.real_models import REAL_MODELS, fetch

    folder = fetch(name, accept_terms=accept_terms, say=tell)
    known = REAL_MODELS[name]
    if known.terms:
        tell(known.terms)
    result = run_real_demo(known, folder, tell)
    document = {
        "about": result.about.splitlines(),
        "layers": result.detection.layers,
        "sites": result.detection.sites.header(),
        "results": _results(result.comparison),
        "magnitudes": result.magnitudes,
        "variation": result.variation,
        "carriers": result.carriers,
        "sinks": result.sinks,
    }
    tables = (result.magnitudes, result.variation, result.carriers, sinks_table(result.sinks))
    show(json, document, result.about, result.comparison, *tables)


def _results(comparison: Comparison) -> list[dict[str, Any]]:
    return [{"mode": row.label, **row.values} for row in comparison.rows]
