"""`biassurgery convert`: a checkpoint, GGUF above all, as a plain folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from biassurgery.cli import options as o
from biassurgery.cli.output import show


def convert(
    source: Annotated[
        str, typer.Argument(help="A GGUF file, a folder with one, or any checkpoint's name.")
    ],
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    dtype: o.DtypeOption = None,
    json: o.Json = False,
) -> None:
    """Write a checkpoint as a plain folder: config.json, safetensors, tokenizer."""
    from biassurgery.data.converting import convert

    loaded = convert(source, folder, dtype=None if dtype is None else dtype.value)
    kind = type(loaded.model).__name__
    precision = str(loaded.model.dtype).removeprefix("torch.")
    tokenizer = loaded.tokenizer is not None
    document = {
        "source": source,
        "folder": str(folder),
        "architecture": kind,
        "dtype": precision,
        "tokenizer": tokenizer,
    }
    with_it = "with" if tokenizer else "without"
    show(json, document, f"{folder}: {kind}, {precision}, {with_it} a tokenizer")
