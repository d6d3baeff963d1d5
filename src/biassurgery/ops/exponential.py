"""The exponential of a number, of any size."""

from __future__ import annotations

import math


def exp(exponent: float) -> float:
    """e to a power; infinity where float64 ends, where `math.exp` raises."""
    try:
        return math.exp(exponent)
    except OverflowError:
        return math.inf
