"""Figures on an image: where massive activations sit, and where [CLS] looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from biassurgery.errors import BadOption
from biassurgery.findings.detection import Detection
from biassurgery.findings.grid import Grid, patch_grid
from biassurgery.plots.figures import RED, new_figure, pixels_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def massive_positions(detection: Detection, image: Any, layer: int | None = None) -> Figure:
    """An image with its patches, and how many massive activations sit on each of them.

    At a block's output; what counts as massive is the detection's own definition.

    Args:
        detection: of images of one size; the counts are over all of them.
        image: one of these as the model reads it, (3, H, W), or a PIL image that is cropped as the
            model's transform does.
        layer: None: the first in which there are massive activations.

    Raises:
        BadOption: nothing was found (there), the patches are not known, or the image is not of
            their grid.
        MissingPackage: matplotlib is not installed.
    """
    pixels = pixels_of(image)
    grid = _grid_on(detection, pixels)
    chosen = _layer_with_positions(detection, layer)
    figure = new_figure(4.4, 4.0 * grid[0] / grid[1] + 0.8)
    axes = figure.subplots()
    _draw(axes, pixels, grid)
    _draw_grid(axes, grid)
    _draw_counts(axes, detection, chosen)
    axes.set_title(
        f"massive activations at the output of block {chosen},\ncounted over"
        f" {detection.sequences:,} images",
        fontsize=9,
    )
    elsewhere = [
        f"{position.token} {position.count}"
        for position in detection.positions
        if position.layer == chosen and position.patch is None
    ]
    if elsewhere:
        axes.set_xlabel(f"column of patches; not on patches: {', '.join(elsewhere)}", fontsize=8)
    return figure


def _grid_on(detection: Detection, pixels: Tensor) -> Grid:
    """The grid of patches that the detection counted on, if it is that of an image (H, W, 3)."""
    grid = detection.grid
    if grid is None:
        raise BadOption(
            "detection: it does not know one grid of patches; detect massive activations in images"
            " of one size."
        )
    if patch_grid((pixels.shape[0], pixels.shape[1]), grid[0] * grid[1]) != grid:
        raise BadOption(
            f"image: {pixels.shape[0]} x {pixels.shape[1]} pixels are not cut into {grid[0]} x"
            f" {grid[1]} patches; give it as the model reads it."
        )
    return grid


def _layer_with_positions(detection: Detection, layer: int | None) -> int:
    """The layer asked for, or the first, of those in which there are massive activations."""
    layers = sorted({position.layer for position in detection.positions})
    if not layers:
        raise BadOption(
            "detection: nothing meets the definition, so there is nothing to draw; detect() takes"
            " another one."
        )
    chosen = layers[0] if layer is None else layer
    if chosen not in layers:
        raise BadOption(
            f"layer: {layer}; nothing meets the definition there, but in layers {layers}."
        )
    return chosen


def _draw_counts(axes: Any, detection: Detection, layer: int) -> None:
    """A red square with the count on every patch that has one; the higher, the more opaque."""
    assert detection.grid is not None
    positions = [position for position in detection.positions if position.layer == layer]
    most = max(position.count for position in positions)
    size = min(9, 110 / max(detection.grid))
    for position in positions:
        if position.patch is None:
            continue
        row, column = position.patch
        axes.fill(
            [column, column + 1, column + 1, column],
            [row, row, row + 1, row + 1],
            facecolor=RED,
            edgecolor=RED,
            linewidth=1.5,
            alpha=0.25 + 0.5 * position.count / most,
        )
        axes.text(
            column + 0.5,
            row + 0.5,
            f"{position.count}",
            color="white",
            fontsize=size,
            ha="center",
            va="center",
        )


def attention_maps(
    maps: Mapping[str, Tensor], image: Any = None, *, prefix: int | Mapping[str, int] = 1
) -> Figure:
    """[CLS]'s attention on the patches, mean over heads.

    A row for each image, a panel for each entry, one logarithmic scale a row: attention sinks are
    there to be seen, and do not hide the rest.

    Args:
        maps: attention (B, H, T) or (H, T) by name, as `cls_attention` returns it; or its mean over
            heads, (T,), or (B, T) with as many images.
        image: images (B, 3, H, W) or (3, H, W), or PIL images, that are shown in front; None: none,
            and patches are on a square.
        prefix: tokens before the patches: [CLS] and the registers; by name, where they differ, as
            under `test_time_registers`, which adds one.

    Raises:
        BadOption: shapes that do not fit together, or patches that are no grid.
        MissingPackage: matplotlib is not installed.
    """
    pictures = [] if image is None else _images(image)
    shares = {
        name: _patches(name, attention, _prefix_of(name, prefix), len(pictures))
        for name, attention in maps.items()
    }
    if len({tuple(share.shape) for share in shares.values()}) != 1:
        found = {name: tuple(share.shape) for name, share in shares.items()}
        raise BadOption(
            f"maps: images and patches behind the prefix {prefix} are {found or 'none'}; give one"
            " or more attentions of the same images and patches, and prefix={name: tokens before"
            " the patches} where these differ."
        )
    rows, patches = next(iter(shares.values())).shape
    shown = [pixels_of(picture) for picture in pictures]
    if shown and len(shown) != rows:
        raise BadOption(f"image: {len(shown)} for the attention of {rows}; give one for each.")
    grid = _grid_of(shown[0] if shown else None, patches, prefix)
    panels = len(shares) + bool(shown)
    figure = new_figure(2.3 * panels + 0.8, 2.5 * rows * grid[0] / grid[1] + 0.4)
    for row, line in enumerate(figure.subplots(rows, panels, squeeze=False)):
        _attention_row(
            figure,
            list(line),
            shown[row] if shown else None,
            {name: share[row].view(grid) for name, share in shares.items()},
        )
        if row == 0:
            for axes, name in zip(line[bool(shown) :], shares):
                axes.set_title(name, fontsize=9)
    return figure


def _attention_row(
    figure: Figure, line: list[Any], pixels: Tensor | None, maps: dict[str, Tensor]
) -> None:
    """One image and its maps (rows, columns), on one scale."""
    drawn: list[Any] = []
    scale = _scale(torch.stack([*maps.values()]))
    if pixels is not None:
        _draw(line[0], pixels, next(iter(maps.values())).shape)
    for axes, share in zip(line[pixels is not None :], maps.values()):
        drawn.append(axes.imshow(share.numpy(), norm=scale, cmap="viridis"))
        axes.set_xlabel(f"on patches: {100 * share.sum():.0f} %", fontsize=8)
    for axes in line:
        axes.set(xticks=[], yticks=[])
    bar = figure.colorbar(drawn[0], ax=line, fraction=0.03, pad=0.01)
    bar.set_label("share of [CLS]'s attention", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _scale(shares: Tensor) -> Any:
    """Logarithmic, from the 1 % quantile, or the smallest above 0, to the largest."""
    from matplotlib.colors import LogNorm, Normalize

    positive = shares[shares > 0].flatten()
    if not positive.numel() or positive.min() == positive.max():
        return Normalize(0, shares.max().item() or 1.0)
    low = positive.kthvalue(1 + len(positive) // 100).values.item()
    return LogNorm(min(low, 0.99 * positive.max().item()), positive.max().item(), clip=True)


def _prefix_of(name: str, prefix: int | Mapping[str, int]) -> int:
    if isinstance(prefix, int):
        return prefix
    if name not in prefix:
        raise BadOption(f"prefix: {dict(prefix)} has no entry for {name!r} of maps; give one each.")
    return prefix[name]


def _grid_of(pixels: Tensor | None, patches: int, prefix: int | Mapping[str, int]) -> Grid:
    """The grid of the patches on an image (H, W, 3), or on a square."""
    height, width = (isqrt(patches), isqrt(patches)) if pixels is None else pixels.shape[:2]
    grid = patch_grid((height, width), patches)
    if grid is None:
        where = "no square" if pixels is None else f"no grid on {height} x {width} pixels"
        raise BadOption(
            f"prefix: {prefix} leaves {patches} patches, which are {where}; count all tokens before"
            " the patches, and give the image as the model reads it."
        )
    return grid


def _draw(axes: Any, pixels: Tensor, grid: Sequence[int]) -> None:
    """An image in units of patches."""
    axes.imshow(pixels.numpy(), extent=(0, grid[1], grid[0], 0))


def _draw_grid(axes: Any, grid: Grid) -> None:
    """Lines between the patches, and their numbers."""
    axes.vlines(range(1, grid[1]), 0, grid[0], color="white", linewidth=0.5, alpha=0.5)
    axes.hlines(range(1, grid[0]), 0, grid[1], color="white", linewidth=0.5, alpha=0.5)
    rows, columns = (range(0, count, 1 + max(grid) // 15) for count in grid)
    axes.set_xticks([i + 0.5 for i in columns], [str(i) for i in columns])
    axes.set_yticks([i + 0.5 for i in rows], [str(i) for i in rows])
    axes.tick_params(length=0, labelsize=7)
    axes.set_xlabel("column of patches", fontsize=8)
    axes.set_ylabel("row of patches", fontsize=8)


def _patches(name: str, attention: Tensor, prefix: int, images: int) -> Tensor:
    """(B, patches) float32, mean over heads."""
    shares = attention.detach().float().cpu()
    if shares.dim() == 3:
        shares = shares.mean(1)
    elif shares.dim() == 2 and not 1 < images == len(shares):  # heads, and not a row an image
        shares = shares.mean(0)
    if shares.dim() not in (1, 2) or not 0 <= prefix < shares.shape[-1]:
        raise BadOption(
            f"maps: {name!r} has shape {tuple(attention.shape)} and prefix is {prefix}; give"
            " attention (B, H, T) or (H, T), or its mean over heads, with patches behind the"
            " prefix."
        )
    return shares.reshape(-1, shares.shape[-1])[:, prefix:]


def _images(image: Any) -> Sequence[Any]:
    if isinstance(image, Tensor):
        return list(image if image.dim() == 4 else image[None])
    return list(image) if isinstance(image, (list, tuple)) else [image]
