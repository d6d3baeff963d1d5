"""What `gpu.py` prints: rows, and the stages that find them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Row(NamedTuple):
    """One line: what was looked at, and what came out."""

    section: str
    name: str
    verdict: str  # passed, failed, inconclusive, measured (nothing was promised), skipped
    said: str
    seconds: float = 0.0


class Stage(NamedTuple):
    """Something to do that may take so many seconds."""

    section: str
    name: str
    seconds: float
    work: Callable[[], list[Row]]


class Skipped(Exception):
    """Why something cannot be looked at here."""


def held(section: str, name: str, is_right: bool, said: str) -> list[Row]:
    """A row of something that must hold."""
    return [Row(section, name, "passed" if is_right else "failed", said)]
