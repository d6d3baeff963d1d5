"""Perplexities of a language model under quantisation, as it is and under each remedy: one table.

    python benchmarks/quantisation.py MODEL --text wiki.test.raw --keep cells.json

Cells are kept as they are computed, with the loss of every window; the same command goes on where
it was. Every cell scores the same tokens. Calibration reads the packaged text or that of
`--calibration`, never a token that is scored.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from quantised import caches
from quantised.intervals import shown, table
from quantised.kept import Cells
from quantised.remedies import COLUMNS, Known, Remedy
from quantised.roundings import ROWS, Row, rounded
from quantised.windows import NO_START, windows
from torch import Tensor

import biassurgery as bs
from biassurgery.data.loading import load_model

EVERY = {**ROWS, **dict.fromkeys(caches.KINDS, Row(caches.COLUMNS))}


class Cell(NamedTuple):
    """A place in the table, measured with calibration data of a seed."""

    row: str
    column: str
    seed: int


def main() -> None:
    options = parsed()
    torch.set_num_threads(1)
    loaded = load_model(options.model, dtype="float32", device=options.device)
    cells = Cells(Path(options.keep), describe(options))
    known: dict[int, Known] = {}
    for cell in wanted(options):
        if cells.has(*cell):
            continue
        if cell.seed not in known:
            known[cell.seed] = Known.of(loaded.model, windows(loaded, options, cell.seed))
        losses, quantile = measure(loaded.model, known[cell.seed], cell.row, cell.column)
        cells.add(*cell, losses, quantile)
        chosen = "" if quantile is None else f" (quantile {quantile:g})"
        say(f"{cell.seed} {cell.column}: {cell.row}: {shown(losses)}{chosen}")
    say(table(cells, options.rows, options.columns))
    for row in options.rows:
        if row in caches.KINDS and not caches.installed(row):
            say(f"{row}: not measured, for {caches.KINDS[row].package} is not installed")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="UTF-8, such as the test split of WikiText-2")
    parser.add_argument("--calibration", help="UTF-8, to calibrate on; left out: the packaged text")
    parser.add_argument("--keep", default="quantisation.json", help="where cells are kept")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--full", action="store_true", help="64 windows of 512 tokens")
    parser.add_argument("--seeds", type=int, default=3, help="of the calibration windows")
    parser.add_argument(
        "--start", help=f"the token in front, where the tokenizer puts none; {NO_START}: none"
    )
    parser.add_argument("--rows", nargs="+", default=list(EVERY), choices=EVERY)
    parser.add_argument("--columns", nargs="+", default=list(COLUMNS), choices=COLUMNS)
    parser.add_argument("--device")
    options = parser.parse_args()
    if options.full:
        options.windows, options.length = 64, 512
    return options


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """What cells of one file have in common."""
    return {
        "model": options.model,
        "text": Path(options.text).name,
        "calibration": options.calibration and Path(options.calibration).name,
        "windows": options.windows,
        "length": options.length,
        "start": options.start,
    }


def wanted(options: argparse.Namespace) -> Iterator[Cell]:
    """The cells of the table, all of the first seed first.

    Others are measured where calibration enters: of a constant start token, what patches write is
    the same whatever follows it.
    """
    for seed in range(options.seeds):
        for row in options.rows:
            if row in caches.KINDS and not caches.installed(row):
                continue
            for column in options.columns:
                varies = EVERY[row].calibrated or options.start == NO_START
                if column in EVERY[row].columns and (varies or not seed):
                    yield Cell(row, column, seed)


def measure(model: Any, known: Known, row: str, column: str) -> tuple[list[float], float | None]:
    """The loss of each window, in nats a token, and the quantile that was chosen, if any."""
    remedy = Remedy.of(column, known)
    twin = copy.deepcopy(model) if row.startswith("torchao") else model
    with remedy.on(twin, known):
        if row in caches.KINDS:
            return caches.losses(twin, known.data.scored, remedy.drop, row), None
        made = rounded(twin, known, row, remedy, lambda rows: losses(twin, rows, remedy.drop))
        with made.context:
            return losses(twin, known.data.scored, remedy.drop), made.quantile


def losses(model: Any, rows: list[Tensor], drop: int) -> list[float]:
    """Of each window; the start token and the one behind it are not scored."""
    found = []
    for row in rows:
        labels = row.clone()
        labels[:, :2] = -100
        batch = {"input_ids": row[:, drop:], "labels": labels[:, drop:]}
        found.append(math.log(bs.perplexity(model, [batch], progress=False)))
    return found


if __name__ == "__main__":
    main()
