"""Where a token of an image is: the grid that the patches form, and a token's place on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

Grid = tuple[int, int]  # rows, columns


def patch_grid(size: tuple[int, int], patches: int) -> Grid | None:
    """(rows, columns) of the square patches that an image is cut into.

    There is at most one answer where a model leaves out what remains at the edges, or fills it up:
    as patches grow, neither number grows.

    Args:
        size: height and width of the image in pixels.
        patches: how many there are.

    Returns:
        None: no square patches of a whole number of pixels come to that many.
    """
    height, width = size
    sides = range(1, min(size) + 1)
    cut = ((height // side, width // side) for side in sides)
    filled = ((-(-height // side), -(-width // side)) for side in sides)
    return next(
        (grid for grids in (cut, filled) for grid in grids if grid[0] * grid[1] == patches), None
    )


def grid_of_batch(
    batch: Mapping[str, Any], roles: tuple[str, ...], tokens: int, kernel: nn.Conv2d | None = None
) -> Grid | None:
    """The patch grid of a batch of images with `tokens` tokens up to the last patch.

    By the convolution that cuts them, if there is one and it comes to so many; else, behind a
    convolutional stem, by square patches.
    """
    if "noise" in batch:  # MAE drops and shuffles patches by it
        return None
    height, width = batch["pixel_values"].shape[-2:]
    patches = tokens - prefix_of(roles)
    if kernel is not None:
        down, across = kernel.stride
        tall, wide = kernel.kernel_size
        for grid in (
            ((height - tall) // down + 1, (width - wide) // across + 1),
            (-(-height // down), -(-width // across)),
        ):
            if grid[0] * grid[1] == patches:
                return grid
    return patch_grid((height, width), patches)


def prefix_of(roles: tuple[str, ...]) -> int:
    """How many tokens are in front of the patches."""
    return roles.index("patch")


def place_of(
    position: int, roles: tuple[str, ...], grid: Grid | None
) -> tuple[str, tuple[int, int] | None]:
    """The role of the token at a position and, of a patch on a known grid, its (row, column).

    Behind the patches are those of the last role.
    """
    prefix = prefix_of(roles)
    if position < prefix:
        return roles[position], None
    if grid is None:
        return " or ".join(roles[prefix:]), None
    if position - prefix >= grid[0] * grid[1]:
        return roles[-1], None
    return "patch", divmod(position - prefix, grid[1])
