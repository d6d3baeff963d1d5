#!/usr/bin/env python3
"""One table: what is published of 18 checkpoints, and what `calibrate` finds on real models.

    python benchmarks/published.py                   # SmolLM2 and Gemma where they were fetched
    python benchmarks/published.py --markdown

Published: Owen et al., arXiv 2503.22329, each checkpoint under its own BOS policy. Ours:
dequantised GGUF weights, eight windows of 256 tokens of the packaged text. Published runs state no
margin.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from rich.console import Console

import biassurgery as bs
from biassurgery.data.loading import load_model
from biassurgery.data.packaged import packaged_text, text_batches
from biassurgery.data.real_models import REAL_MODELS, model_folder
from biassurgery.findings.published import published_runs

say = partial(Console().print, markup=False, highlight=False, soft_wrap=True)
COLUMNS = ("checkpoint", "massive at blocks", "channels", "roles", "largest", "margin")
LENGTH = 256
WINDOWS = 8


def published_rows() -> list[tuple[str, ...]]:
    """One row a checkpoint, as its tokenizer is used by default."""
    return [
        row(
            run.checkpoint,
            list(run.layers),
            {site.channel for site in run.sites},
            [site.role for site in run.sites],
            [site.value for site in run.sites],
            None,
        )
        for run in published_runs()
        if run.bos == run.bos_by_default
    ]


def measured_rows() -> list[tuple[str, ...]]:
    """One row a real model that was fetched."""
    rows = []
    for name, known in REAL_MODELS.items():
        folder = model_folder(name)
        if not folder.is_dir():
            say(f"{known.title}: not fetched; `biassurgery fetch {name}` gets it")
            continue
        loaded = load_model(str(folder), dtype="float32")
        text = packaged_text("calibration")
        ids = torch.cat(text_batches(loaded.tokenizer, text, LENGTH))[:WINDOWS]
        sites = bs.calibrate(loaded.model, ids.split(4))
        rows.append(
            row(
                f"{known.title} (dequantised GGUF)",
                list(sites.layers()),
                {site.channel for site in sites},
                [site.role for site in sites],
                [site.mean for site in sites],
                min((site.margin for site in sites if site.margin is not None), default=None),
            )
        )
    return rows


def row(
    name: str,
    layers: list[int],
    channels: set[int],
    roles: list[str],
    values: list[float],
    margin: float | None,
) -> tuple[str, ...]:
    if not layers:
        return (name, "none", "", "", "", "")
    return (
        name,
        f"{min(layers)} to {max(layers)}",
        ", ".join(map(str, sorted(channels))),
        ", ".join(sorted(set(roles), reverse=True)),
        f"{max(values, key=abs):,.0f}" if values else "",
        "" if margin is None else f"{margin:.1f}x",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    rows = [*published_rows(), *measured_rows()]
    if arguments.markdown:
        for cells in (COLUMNS, ("---",) * len(COLUMNS), *rows):
            say(f"| {' | '.join(cells)} |")
        return
    widths = [max(len(cells[at]) for cells in (COLUMNS, *rows)) for at in range(len(COLUMNS))]
    for cells in (COLUMNS, *rows):
        say("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip())


if __name__ == "__main__":
    main()
