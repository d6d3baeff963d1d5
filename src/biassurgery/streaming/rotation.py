"""Moving rotary keys to later positions."""

from __future__ import annotations

import torch
from torch import Tensor


class Rotation:
    """Turns keys that are rotated already by so many positions more.

    Exact, whatever their position and the model's scaling of them.

    Args:
        frequencies: (n,) angle a position of each pair of channels, in the first 2 n channels;
            None: keys hold no position.
        interleaved: pairs are neighbours (2 i, 2 i + 1); otherwise (i, i + n).
    """

    def __init__(self, frequencies: Tensor | None, interleaved: bool = False) -> None:
        if frequencies is not None:
            frequencies = frequencies.detach().to("cpu", torch.float64)
        self.frequencies = frequencies
        self.interleaved = interleaved
        # Every layer asks for the same angles: what for, their cos and sin.
        self._latest: tuple[object, Tensor, Tensor] | None = None

    def fits(self, width: int) -> bool:
        """Whether keys of so many channels can be turned."""
        return self.frequencies is None or 2 * len(self.frequencies) <= width

    def __call__(self, keys: Tensor, by: tuple[int, ...]) -> Tensor:
        """Keys (B, H, T, d) turned by whole positions, one number for all rows or one a row.

        Computed in float32 or better.
        """
        if self.frequencies is None:
            return keys
        cos, sin = self._angles(by, keys)
        pairs = len(self.frequencies)
        turned = keys[..., : 2 * pairs].to(cos.dtype)
        rest = keys[..., 2 * pairs :]
        a, b = (turned[..., ::2], turned[..., 1::2]) if self.interleaved else turned.chunk(2, -1)
        a, b = a * cos - b * sin, b * cos + a * sin
        turned = torch.stack((a, b), -1).flatten(-2) if self.interleaved else torch.cat((a, b), -1)
        return torch.cat((turned.to(keys.dtype), rest), -1)

    def _angles(self, by: tuple[int, ...], keys: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin (1 or B, 1, 1, n).

        The angles are in float64, so that they are exact after any number of positions.
        """
        assert self.frequencies is not None
        dtype = torch.promote_types(keys.dtype, torch.float32)
        purpose = (by, dtype, keys.device)
        if self._latest is None or self._latest[0] != purpose:
            angles = torch.tensor(by, dtype=torch.float64)[:, None] * self.frequencies
            angles = angles[:, None, None]
            cos = angles.cos().to(keys.device, dtype)
            sin = angles.sin().to(keys.device, dtype)
            self._latest = (purpose, cos, sin)
        return self._latest[1:]
