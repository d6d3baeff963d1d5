"""Massive activations of a timm vision transformer: where they sit, what accuracy is without them,
and what [CLS] attends to.

    python examples/vit_massive_activations.py vit_tiny_patch16_224 --weights vit.safetensors
    --images folder --out figures/vit

The folder holds labelled images: `labels.csv` (columns file, class_index) or a sub-folder for each
    class. Every other image calibrates, the
rest evaluates. Printed: what `detect` finds, and top-1 accuracy with massive activations as they
are, set to zero, set to their mean, and with as many other values set to zero (Sun et al. 2024,
table 4). Drawn, as figures 11, 13 and 16 of the paper and one more:

OUT_magnitudes.png    the three largest magnitudes and the median at each block's output
OUT_activations.png   one hidden state, channel x token, at the block where massive activations
first appear OUT_positions.png     the patches on which they are OUT_attention.png     [CLS]'s
attention in the last layer on each image of --show, with and without fixing
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import biassurgery as bs
from biassurgery import plots
from biassurgery.data.loading import load_model
from biassurgery.data.reading import ImageBatches, ImageFile, image_files, selected
from biassurgery.measure.cls_attention import cls_attention

BATCH = 20


def draw(model: nn.Module, found: bs.Detection, images: Tensor, out: str) -> None:
    """All figures; `images` (B, 3, H, W) are those that are shown."""
    first = found.sites.layers()[0]
    maps = {"original": cls_attention(model, images)}
    for mode in ("set_mean", "set_zero"):
        with bs.patched(model, mode, sites=found.sites):
            maps[mode] = cls_attention(model, images)
    with bs.record(model, "block_output", layers=first) as seen, torch.no_grad():
        model(images[:1])
    figures = {
        "magnitudes": plots.magnitudes(found),
        "activations": plots.activations_3d(
            seen["block_output"][first][0], title=f"one image at the output of block {first}"
        ),
        "positions": plots.massive_positions(found, images[0]),
        "attention": plots.attention_maps(maps, images, prefix=model.num_prefix_tokens),
    }
    for name, figure in figures.items():
        figure.savefig(f"{out}_{name}.png", dpi=72)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="name of a timm model")
    parser.add_argument(
        "--weights", type=Path, help="its parameters (safetensors); default: timm's pretrained ones"
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of labelled images")
    parser.add_argument(
        "--show",
        type=Path,
        nargs="+",
        help="images for the figures; default: the first two of the folder",
    )
    parser.add_argument(
        "--out", required=True, help="what the names of the written files begin with"
    )
    arguments = parser.parse_args()
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)

    model = load_model(arguments.model, weights=arguments.weights).model
    files = image_files(arguments.images, model.num_classes)  # type: ignore[arg-type]
    even, odd = (
        ImageBatches([files[i] for i in selected(len(files), half, None)], model, BATCH)
        for half in ("even", "odd")
    )
    found = bs.detect(model, even, source=f"every other image of {arguments.images}")
    print(found)  # noqa: T201
    if not len(found.sites):
        raise SystemExit(
            "model: it has no massive activations, so there is nothing to fix or to draw."
        )
    modes = [None, "set_zero", "set_mean", "zero_random"]
    table = bs.compare(
        model, lambda each: {"top1": bs.top1_accuracy(each, odd)}, modes, sites=found.sites
    )
    print(table)  # noqa: T201
    shown = [ImageFile(path) for path in arguments.show or [file.path for file in files[:2]]]
    device = next(model.parameters()).device
    draw(
        model,
        found,
        torch.cat([each.to(device) for each in ImageBatches(shown, model, BATCH)]),
        arguments.out,
    )  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
