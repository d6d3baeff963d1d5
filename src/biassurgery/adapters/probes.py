"""Images that differ in one pixel each, and what follows from the tokens that then differ."""

from __future__ import annotations

import torch
from torch import Tensor

from biassurgery.errors import UnsupportedModel

_STEP = 4.0  # what is added to a pixel: plain in half precision, too


class Probes:
    """One image; another one; and the first with one pixel changed: in corner patches and inside.

    Args:
        one: the image (1, C, H, W), of noise.
        patch: height and width of what is said to be a patch.
    """

    def __init__(self, one: Tensor, patch: tuple[int, int]) -> None:
        height, width = one.shape[-2:]
        down, across = patch[0] // 2, patch[1] // 2
        self.one = one
        self.size = height, width
        inside = [(0.3, 0.6), (0.6, 0.2), (0.45, 0.85)]
        self.pixels = [
            (down, across),
            (down, width - 1 - across),
            (height - 1 - down, across),
            (height - 1 - down, width - 1 - across),
            *((int(y * height), int(x * width)) for y, x in inside),
        ]
        changed = one.repeat(2 + len(self.pixels), 1, 1, 1)
        changed[1] = -changed[1] + 1.0
        for row, (y, x) in enumerate(self.pixels, start=2):
            changed[row, :, y, x] += _STEP
        self.images = changed

    def patches(self, kind: str, entered: Tensor) -> tuple[int, int, tuple[int, int]]:
        """Where patches are among the tokens, from the hidden states (N, T, D) of the images.

        Args:
            kind: the class of the model.
            entered: what the first block reads.

        Returns:
            The first of them, the one behind the last, and their rows and columns.

        Raises:
            UnsupportedModel: they are not the cells of a grid, one behind the other and row by row.
        """
        differs = (entered != entered[:1]).any(-1)
        every = differs[1].nonzero().flatten().tolist()
        touched = [row.nonzero().flatten().tolist() for row in differs[2:]]
        if not every or every != list(range(every[0], every[-1] + 1)):
            raise no_stream(kind, f"{len(every)} tokens follow from the image, not one run of them")
        if any(len(tokens) != 1 for tokens in touched):
            counts = sorted({len(tokens) for tokens in touched})
            raise no_stream(
                kind,
                f"one pixel reaches {' or '.join(map(str, counts))} tokens (a convolutional stem,"
                " or patches that overlap), where each patch is one token",
            )
        first, last = every[0], every[-1] + 1
        columns = touched[1][0] - first + 1
        grid = (last - first) // columns, columns
        places = [first + self._cell(pixel, grid) for pixel in self.pixels]
        if grid[0] * grid[1] != last - first or places != [tokens[0] for tokens in touched]:
            raise no_stream(kind, "its patches do not come row by row")
        return first, last, grid

    def _cell(self, pixel: tuple[int, int], grid: tuple[int, int]) -> int:
        row, column = (at * count // size for at, count, size in zip(pixel, grid, self.size))
        return row * grid[1] + column


def noise(channels: int, size: tuple[int, int], like: Tensor) -> Tensor:
    """One image (1, C, H, W) of noise, the same each time, on the device of a weight."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, channels, *size, generator=generator)
    dtype = like.dtype if like.is_floating_point() else torch.float32
    return pixels.to(like.device, dtype)


def no_stream(kind: str, what: str) -> UnsupportedModel:
    """The error for a model that is not one stream of tokens in a known order."""
    return UnsupportedModel(
        f"model: a trial run of {kind} shows no one stream of tokens (B, T, D) that can be told"
        f" apart: {what}. If its blocks have one, register an ImageAdapter that says where."
    )
