"""Tallies of given values, and their levels by plain loops."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from biassurgery.findings.levels import Level, levels
from biassurgery.findings.tally import Tally

LAYERS = 3
WIDTH = 5
ROLES = 2


@dataclass(frozen=True)
class Value:
    """One large value that a measurement set aside."""

    layer: int
    channel: int
    role: int
    value: float
    hit: bool


def float64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def tallied(
    values: list[Value],
    below: dict[tuple[int, int], float] | None = None,
    sequences: int = 0,
    tokens: int = 0,
) -> Tally:
    tally = Tally.empty(LAYERS, WIDTH)
    if values:
        keys = [
            tally.key(
                v.layer, torch.tensor([v.channel]), torch.tensor([v.role]), ROLES, float64(v.value)
            )
            for v in values
        ]
        tally = tally.with_values(
            torch.cat(keys),
            float64(*(v.value for v in values)),
            torch.tensor([v.hit for v in values]),
        )
    lower = torch.zeros(LAYERS, WIDTH)
    for place, magnitude in (below or {}).items():
        lower[place] = magnitude
    return tally.with_totals(
        lower, torch.full((LAYERS,), float(sequences)).double(), sequences, tokens
    )


def found(tally: Tally) -> list[Level]:
    return list(levels(tally, ROLES))
