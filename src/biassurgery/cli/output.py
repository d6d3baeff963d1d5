"""What commands print: tables for people, one JSON document for machines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from biassurgery.cli.inputs import Inputs


def show(as_json: bool, document: dict[str, Any], *renderables: Any) -> None:
    """Print a result on stdout, in one of its two forms."""
    if as_json:
        typer.echo(json.dumps(_plain(document), allow_nan=False, indent=2))
        return
    from rich.console import Console

    console = Console()
    for renderable in renderables:
        console.print(
            renderable, highlight=False, markup=False, soft_wrap=isinstance(renderable, str)
        )


def _plain(value: Any) -> Any:
    """A value in terms of JSON; what is not finite becomes null."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def header(inputs: Inputs) -> dict[str, Any]:
    """What every document begins with: the model and the data."""
    return {"model": inputs.model, "data": inputs.data}


def about(inputs: Inputs) -> str:
    """The same for people."""
    model = inputs.model
    return (
        f"model: {model['name']}, {model['architecture']}, {model['blocks']} blocks of width"
        f" {model['width']}, {model['dtype']} on {model['device']}\ndata: {inputs.source}\n"
    )
