"""Numbers and words of a finding, or refused: JSON has other types, and no ranges."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch

from biassurgery.errors import BadOption

_MOST = 2**63 - 1
LARGEST = torch.finfo(torch.float32).max  # what findings are computed with


def whole(name: str, value: object, least: int = 0) -> int:
    """An integer of at least `least`, which is no bool.

    Raises:
        BadOption: it is something else.
    """
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if number is None or not least <= number <= _MOST:
        raise BadOption(f"{name}: {value!r}; give an integer of at least {least}.")
    return number


def real(name: str, value: object, least: float = -LARGEST) -> float:
    """A number that float32 can hold, of at least `least`.

    Raises:
        BadOption: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise BadOption(f"{name}: {value!r}; give a number.")
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not least <= number <= LARGEST:
        raise BadOption(f"{name}: {number!r} is not from {least:g} to {LARGEST:g}; measure again.")
    return number


def items(name: str, value: object) -> list[Any]:
    """A list.

    Raises:
        BadOption: it is something else.
    """
    if not isinstance(value, list):
        raise BadOption(f"{name}: {value!r}; give a list.")
    return value


def words(name: str, value: object) -> str:
    """A string.

    Raises:
        BadOption: it is something else.
    """
    if not isinstance(value, str):
        raise BadOption(f"{name}: {value!r}; give a name.")
    return value
