"""Which columns of a mask of tokens are those of the tokens that a forward reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from biassurgery.surgery.block import cached_tokens


def own_columns(marks: Tensor, length: int, given: Mapping[str, Any]) -> Tensor:
    """The columns (B, T) of the tokens that a forward reads, of what says something of all (B, S).

    They are the last ones, except with a static cache: a mask may be as wide as that is, with
    columns of what has not been read yet behind them.

    Args:
        marks: (B, S), a column for each token that is cached or read, or for these alone.
        length: T.
        given: the arguments of the forward.
    """
    if marks.shape[1] <= length or not any(map(_is_static, given.values())):
        return marks[:, -length:]
    places = torch.arange(length, device=marks.device) + cached_tokens(0, (), dict(given))
    return marks.index_select(1, places.clamp(max=marks.shape[1] - 1))


def _is_static(value: Any) -> bool:
    return hasattr(value, "get_seq_length") and getattr(value, "is_compileable", False)
