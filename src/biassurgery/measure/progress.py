"""How far a long pass has come, where no terminal shows a bar: a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
SECONDS = 10.0


def with_lines(
    items: Iterable[Item], name: str, total: int | None, unit: str = "batch"
) -> Iterator[Item]:
    """The items; of a pass that takes long, lines on stderr say how far it is.

    Of several ranks the first one does.
    """
    began = said = time.monotonic()
    silent = _rank() != 0
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - said >= SECONDS and not silent:
            said = now
            sys.stderr.write(_line(name, done, total, now - began, unit) + "\n")
            sys.stderr.flush()
        yield item


def count_of(batches: Any) -> int | None:
    """How many batches there are; None: that is not known."""
    if isinstance(batches, (Tensor, Mapping)):
        return 1
    try:
        return len(batches)
    except TypeError:  # a DataLoader has a length only where its dataset has one
        return None


def _line(name: str, done: int, total: int | None, seconds: float, unit: str) -> str:
    units = {"batch": "batches"}.get(unit, f"{unit}s")
    if total is None or not done:
        return f"{name}: {done} {units} in {seconds:.0f} s"
    left = seconds / done * (total - done)
    return f"{name}: {done} of {total} {units} in {seconds:.0f} s, about {left:.0f} s to go"


def _rank() -> int:
    distributed = torch.distributed
    together = distributed.is_available() and distributed.is_initialized()
    return distributed.get_rank() if together else 0
