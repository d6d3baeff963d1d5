"""Perplexities of a language model under int8, as it is and under each remedy: one table.

    python benchmarks/quantisation.py MODEL --text wiki.test.raw --keep cells.json

Cells are kept as they are computed, with the loss of every window; the same command goes on where
it was. Every cell scores the same tokens. Calibration reads the packaged text, never `--text`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import biassurgery as bs
from biassurgery.adapters.linears import linears
from biassurgery.adapters.registry import find_host
from biassurgery.data.loading import load_model
from biassurgery.data.packaged import packaged_text, special_prefix
from biassurgery.evaluate.quantised import fake_quantised
from biassurgery.integrations.torchao import QUANTILES, quantize_static
from biassurgery.measure.linear_quantiles import LinearQuantiles

COLUMNS = ("as it is", "set_mean", "ignore list", "pin", "transplant")
# Of each row: what of it depends on calibration data, so that it is measured for several of them.
ROWS = {
    "float32": False,
    "weights int8": False,
    "static, largest": True,
    "static, quantile": True,
    "static, ordinary": True,
    "dynamic per tensor": False,
    "dynamic per token": False,
    "torchao static": True,
    "torchao static, SmoothQuant": True,
    "weights int4": False,
    "weights int3": False,
}
_DRAWS = 2000  # of windows, for an interval


class Data(NamedTuple):
    """Windows (1, T) with the start token in front: to calibrate on, to choose by, to score."""

    calibration: list[Tensor]
    held: list[Tensor]
    scored: list[Tensor]


def main() -> None:
    options = parsed()
    torch.set_num_threads(1)
    loaded = load_model(options.model, dtype="float32", device=options.device)
    start = start_of(loaded.tokenizer, options.start)
    cells = Cells(Path(options.keep), describe(options))
    for seed in range(options.seeds):
        known = Known.of(loaded.model, windows(loaded, options, start, seed))
        for column in options.columns:
            for row in options.rows:
                if seed and not (ROWS[row] or column in ("set_mean", "pin")):
                    continue  # it does not depend on the seed
                if not cells.has(row, column, seed):
                    losses = measure(loaded.model, known, row, column)
                    cells.add(row, column, seed, losses)
                    sys.stdout.write(f"{seed} {column}: {row}: {shown(losses)}\n")
                    sys.stdout.flush()
    sys.stdout.write(table(cells, options.rows, options.columns) + "\n")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="UTF-8, such as the test split of WikiText-2")
    parser.add_argument("--keep", default="quantisation.json", help="where cells are kept")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--full", action="store_true", help="64 windows of 512 tokens")
    parser.add_argument("--seeds", type=int, default=3, help="of the calibration windows")
    parser.add_argument("--start", help="a token to put in front where the tokenizer puts none")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
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
        "windows": options.windows,
        "length": options.length,
        "start": options.start,
    }


class Cells:
    """The losses of every cell, in a file that is written whenever there is a new one."""

    def __init__(self, file: Path, about: dict[str, Any]) -> None:
        self.file = file
        self.kept: dict[str, Any] = {"about": about, "cells": {}}
        if file.is_file():
            self.kept = json.loads(file.read_text())
            if self.kept["about"] != about:
                raise SystemExit(f"{file} is of {self.kept['about']}; give another --keep")

    def has(self, row: str, column: str, seed: int) -> bool:
        return f"{row} | {column} | {seed}" in self.kept["cells"]

    def add(self, row: str, column: str, seed: int, losses: list[float]) -> None:
        self.kept["cells"][f"{row} | {column} | {seed}"] = losses
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.kept))
        part.replace(self.file)

    def of(self, row: str, column: str) -> list[list[float]]:
        """The losses of the windows, a list a seed."""
        start = f"{row} | {column} | "
        return [losses for name, losses in self.kept["cells"].items() if name.startswith(start)]


def start_of(tokenizer: Any, start: str | None) -> int:
    """The token that goes in front of every window."""
    prefix = special_prefix(tokenizer)
    if start is not None:
        return int(tokenizer.convert_tokens_to_ids(start))
    if not prefix:
        raise SystemExit("the tokenizer puts no token in front; name one by --start")
    return prefix[0]


def windows(loaded: Any, options: argparse.Namespace, start: int, seed: int) -> Data:
    """Windows that follow each other in the text, and eight of the packaged text by seed."""
    step = options.length - 1

    def cut(text: str, starts: list[int] | None, count: int) -> list[Tensor]:
        ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        at = [step * i for i in range(count)] if starts is None else starts
        rows = [[start, *ids[i : i + step]] for i in at]
        if any(len(row) < options.length for row in rows):
            raise SystemExit(f"the text has {len(ids)} tokens: too few for {count} windows")
        return [torch.tensor([row], device=loaded.model.device) for row in rows]

    packaged = packaged_text("calibration")
    tokens = len(loaded.tokenizer(packaged, add_special_tokens=False)["input_ids"])
    starts = random.Random(seed).sample(range(tokens - step), 8)
    eight = cut(packaged, starts, 8)
    text = Path(options.text).read_text(encoding="utf-8")
    return Data(eight[:6], eight[6:], cut(text, None, options.windows))


class Known(NamedTuple):
    """What calibration data tell of the model as it is."""

    data: Data
    diagnosis: bs.Diagnosis
    key_values: bs.KeyValues

    @classmethod
    def of(cls, model: Any, data: Data) -> Known:
        found = bs.diagnose(model, data.calibration, progress=False)
        return cls(data, found, bs.calibrate_key_values(model, data.calibration, progress=False))


def measure(model: Any, known: Known, row: str, column: str) -> list[float]:
    """The loss of each window, in nats a token."""
    twin = copy.deepcopy(model) if row.startswith("torchao") else model
    drop = int(column == "transplant")  # tokens that leave the front of every window
    with remedied(twin, column, known), rounded(twin, known, row, column, drop):
        return losses(twin, known.data.scored, drop)


def remedied(model: Any, column: str, known: Known) -> AbstractContextManager[Any]:
    """The model with a remedy on."""
    if column == "transplant":
        return bs.patched(model, "transplant", key_values=known.key_values)
    sites = known.diagnosis.sites
    if column == "pin":
        starts = [site for site in sites if site.role == "start"]
        return bs.patched(model, "pin", sites=bs.Sites(starts, origin=sites.origin))
    if column == "set_mean":
        return bs.patched(model, column, sites=sites)
    return nullcontext()


def rounded(
    model: Any, known: Known, row: str, column: str, drop: int
) -> AbstractContextManager[Any]:
    """The model under a quantisation; `torchao` changes it for good."""
    ignore = known.diagnosis.ignore() if column == "ignore list" else []
    if row == "float32":
        return nullcontext()
    calibration, held = ([w[:, drop:] for w in part] for part in known.data[:2])
    if row.startswith("torchao"):
        smooth = 0.5 if "SmoothQuant" in row else None
        # There the fourth and the eighth of eight batches choose the quantile.
        quantize_static(model, [*calibration, *held], ignore=ignore, smooth=smooth, progress=False)
        return nullcontext()
    if row.startswith("weights"):
        return fake_quantised(model, "exact", bits=int(row[-1]), ignore=ignore)
    if row.startswith("dynamic"):
        return fake_quantised(model, "token" if row.endswith("token") else "tensor", ignore=ignore)
    largest = static_scales(model, known, row, calibration, held, ignore)
    return fake_quantised(model, "static", largest=largest, ignore=ignore)


def static_scales(
    model: Any,
    known: Known,
    row: str,
    calibration: list[Tensor],
    held: list[Tensor],
    ignore: list[str],
) -> dict[str, float]:
    """Reaching to the largest magnitude, or to the quantile that the held windows choose.

    Or, in layers that massive tokens rule, to the largest of other tokens.
    """
    if row == "static, ordinary":
        ruled = known.diagnosis.ignore()
        return {
            linear.name: linear.ordinary if linear.name in ruled else linear.largest
            for linear in known.diagnosis.linears
        }
    host = find_host(model)
    seen = LinearQuantiles(host, linears(host))
    seen.read([{"input_ids": window} for window in calibration], "scales", progress=False)
    if row == "static, largest":
        return seen.quantile(1.0)

    def cost(share: float) -> float:
        with fake_quantised(model, "static", largest=seen.quantile(share), ignore=ignore):
            return sum(losses(model, held, 0))

    return seen.quantile(min(QUANTILES, key=cost))


def losses(model: Any, rows: list[Tensor], drop: int) -> list[float]:
    """Of each window; the start token and the one behind it are not scored."""
    found = []
    for row in rows:
        labels = row.clone()
        labels[:, :2] = -100
        batch = {"input_ids": row[:, drop:], "labels": labels[:, drop:]}
        found.append(math.log(bs.perplexity(model, [batch], progress=False)))
    return found


def table(cells: Cells, rows: list[str], columns: list[str]) -> str:
    """Markdown: perplexity, and how many times that of the same column in float32."""
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for row in rows:
        shown_cells = [cell(cells.of(row, c), cells.of("float32", c)) for c in columns]
        lines.append(f"| {row} | " + " | ".join(shown_cells) + " |")
    return "\n".join(lines)


def cell(found: list[list[float]], control: list[list[float]]) -> str:
    """Mean over seeds, ratio to float32 with the 95 % interval of a paired bootstrap over windows,
    and the range over seeds.
    """
    if not found:
        return ""
    means = [sum(values) / len(found) for values in zip(*found)]
    if not control or found == control:
        return shown(means)
    plain = [sum(values) / len(control) for values in zip(*control)]
    differences = [a - b for a, b in zip(means, plain)]
    draw = random.Random(0)
    drawn = sorted(
        sum(draw.choices(differences, k=len(differences))) / len(differences) for _ in range(_DRAWS)
    )
    low, high = drawn[_DRAWS // 40], drawn[-_DRAWS // 40]
    text = f"{shown(means)}, {exp(mean(differences)):.3g}x ({exp(low):.3g}-{exp(high):.3g})"
    if len(found) > 1:
        each = sorted(mean(values) for values in found)
        text += f", seeds {exp(each[0]):.4g}-{exp(each[-1]):.4g}"
    return text


def shown(values: list[float]) -> str:
    return f"{exp(mean(values)):.4g}"


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


if __name__ == "__main__":
    main()
