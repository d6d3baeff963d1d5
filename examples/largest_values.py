"""The picture of README: the largest values of a language model, with its start token and without.

    python examples/largest_values.py MODEL --start "<|im_start|>" --out picture.png

MODEL is a folder or a name. Left: the model as it is. Right: `transplant` has made explicit
attention biases of what the start token gives to attention, and the token has left the input.
Calibrated on one packaged public-domain text, drawn on another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import biassurgery as bs
from biassurgery.data.packaged import packaged_text

BLUE, GREY = "#0072b2", "#767676"
ROWS, LENGTH = 8, 256


def main(
    model: str,
    start: Annotated[str, typer.Option()],
    out: Annotated[Path, typer.Option()],
) -> None:
    """Measure both, and draw them on one scale."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    host = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    known = sequences(tokenizer, "calibration", start)
    other = sequences(tokenizer, "evaluation", start)
    before = bs.detect(host, [other])
    with bs.patched(host, "transplant", key_values=bs.calibrate_key_values(host, [known])):
        after = bs.detect(host, [other[:, 1:]])
    draw(before, after, start).savefig(out, dpi=160)
    for name, found in (("as it is", before), ("transplant", after)):
        top = max(found.layers, key=lambda row: row.top[0])
        typer.echo(f"{name}: largest {top.top[0]:,.0f} at block {top.layer}")


def sequences(tokenizer: Any, name: str, start: str) -> Tensor:
    """Windows of a packaged text (rows, length), each behind the start token."""
    ids = tokenizer(packaged_text(name), add_special_tokens=False, return_tensors="pt").input_ids
    rest = ids[0, : ROWS * (LENGTH - 1)].view(ROWS, LENGTH - 1)
    first = torch.full((ROWS, 1), tokenizer.convert_tokens_to_ids(start))
    return torch.cat([first, rest], 1)


def draw(before: bs.Detection, after: bs.Detection, start: str) -> Figure:
    """Two panels that share their axes."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = (f"as it is, {start} in front", "transplant: the start token is gone")
    for axes, found, title in zip(panels, (before, after), titles, strict=True):
        layers = [row.layer for row in found.layers]
        axes.plot(layers, [row.top[0] for row in found.layers], color=BLUE, label="largest")
        axes.plot(layers, [row.median for row in found.layers], "--", color=GREY, label="median")
        axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("block")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("magnitude of a hidden state")
    panels[0].legend(frameon=False, fontsize=9)
    return figure


if __name__ == "__main__":
    typer.run(main)
