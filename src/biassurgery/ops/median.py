"""The exact median magnitude of each sequence, by counting bits instead of sorting."""

from __future__ import annotations

import torch
from torch import Tensor

# (shift, bits) of each digit; the sign bit is 0.
_DIGITS = {
    16: ((4, 11), (0, 4)),
    32: ((20, 11), (10, 10), (0, 10)),
}


def median_magnitude(magnitude: Tensor, real: Tensor | None = None) -> Tensor:
    """The lower median of each sequence's magnitudes: exactly the middle one of a sort.

    Bit patterns of non-negative floats order as the floats do, so the median's digits are found one
    after the other, by counting the values that share the digits found so far: one pass over all
    values, the next over few. With decimal digits, the median of 31 35 38 52 97: the rank of the
    lower median is 2, the tens are 3 3 3 5 9, of which that at rank 2 is a 3; among the three
    values with that digit the rank is 2 - 0, the units are 1 5 8, and at rank 2 is an 8: 38.

    Args:
        magnitude: (B, T, D) non-negative; float64 is read as float32.
        real: (B, T) bool, False for padding; None: all tokens are real.

    Returns:
        (B,) float32; 0 for a sequence without real tokens.
    """
    count, length, width = magnitude.shape
    half = magnitude.dtype in (torch.bfloat16, torch.float16)
    rows = torch.arange(count, device=magnitude.device, dtype=torch.int32)
    rows = rows[:, None].expand(count, length)
    if real is None:
        rows = rows.reshape(-1)
        tokens = magnitude.reshape(-1, width)
    else:
        rows = rows[real]
        tokens = magnitude[real]
    if half:
        bits = tokens.contiguous().view(torch.int16).int()
    else:
        bits = tokens.float().contiguous().view(torch.int32)
    prefix = torch.zeros(count, dtype=torch.int64, device=magnitude.device)
    rank: Tensor | None = None
    for shift, digit_bits in _DIGITS[16 if half else 32]:
        size = 1 << digit_bits
        upper = bits >> shift
        # Row r counts in bins r * size to (r + 1) * size - 1.
        bins = ((upper & (size - 1)) + (rows * size)[:, None]).flatten()
        counts = torch.bincount(bins, minlength=count * size).view(count, size)
        total = counts.cumsum(1)
        if rank is None:
            rank = (total[:, -1] - 1).div(2, rounding_mode="floor").clamp(min=0)
        digit = torch.where(total[:, -1] > 0, (total <= rank[:, None]).sum(1), 0)
        rank = rank - (total - counts).gather(1, digit[:, None]).squeeze(1)
        prefix = (prefix << digit_bits) | digit
        if shift:
            same = upper == prefix.int()[rows, None]
            bits = bits[same][:, None]
            rows = rows[same.nonzero()[:, 0]]
    if half:
        return prefix.to(torch.int16).view(magnitude.dtype).float()
    return prefix.int().view(torch.float32)
