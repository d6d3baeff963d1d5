"""The exact median magnitude of each sequence, by counting the bits of the values instead of sorting them."""

from __future__ import annotations

import torch
from torch import Tensor

_SIZE = 1 << 16  # how many patterns half a float32 has, or a whole bfloat16 or float16
_ROWS = 64  # sequences counted at a time, which bounds the table of counts to 32 MiB


def median_magnitude(magnitude: Tensor, real: Tensor | None = None) -> Tensor:
    """The lower median of each sequence's magnitudes: exactly the value that a sort would put in the middle.

    Bit patterns of non-negative floats order as the floats do, so two counting passes (one for 16-bit types) find it.

    Args:
        magnitude: (B, T, D) non-negative; float64 is read as float32.
        real: (B, T) bool, False for padding; None: all tokens are real.

    Returns:
        (B,) float32; 0 for a sequence without real tokens.
    """
    parts = [_median(magnitude[at : at + _ROWS], None if real is None else real[at : at + _ROWS])
             for at in range(0, magnitude.shape[0], _ROWS)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _median(magnitude: Tensor, real: Tensor | None) -> Tensor:
    count, length, width = magnitude.shape
    rows = torch.arange(count, device=magnitude.device, dtype=torch.int32)[:, None].expand(count, length)
    if real is None:
        rows, tokens = rows.reshape(-1), magnitude.reshape(-1, width)
    else:
        rows, tokens = rows[real], magnitude[real]
    if magnitude.dtype in (torch.bfloat16, torch.float16):
        bits = tokens.contiguous().view(torch.int16).to(torch.int32)
        pattern, _ = _pattern_at(bits, rows, count, None)
        return pattern.to(torch.int16).view(magnitude.dtype).float()
    bits = tokens.float().contiguous().view(torch.int32)
    upper = bits >> 16
    high, rank = _pattern_at(upper, rows, count, None)
    inside = upper == high.to(torch.int32)[rows, None]
    low, _ = _pattern_at((bits[inside] & (_SIZE - 1))[:, None], rows[inside.nonzero()[:, 0]], count, rank)
    return ((high << 16) | low).to(torch.int32).view(torch.float32)


def _pattern_at(patterns: Tensor, rows: Tensor, count: int, rank: Tensor | None) -> tuple[Tensor, Tensor]:
    """Per row the pattern at `rank` (default: the middle), and the rank left among equal patterns; patterns (N, D) int32."""
    keys = patterns + (rows * _SIZE)[:, None]
    counts = torch.bincount(keys.flatten(), minlength=count * _SIZE).view(count, _SIZE)
    total = counts.cumsum(1)
    if rank is None:
        rank = (total[:, -1] - 1).div(2, rounding_mode="floor").clamp(min=0)
    found = (total <= rank[:, None]).sum(1)
    found = torch.where(total[:, -1] > 0, found, 0)
    before = (total - counts).gather(1, found[:, None]).squeeze(1)
    return found, rank - before
