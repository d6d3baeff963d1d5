"""Hidden states with known massive activations, and what an edit makes of them by a loop."""

from __future__ import annotations

import torch
from torch import Tensor

import biassurgery as bs

WIDTH = 12
SITES = bs.Sites(
    [
        bs.Site(0, 2, "start", 3000.0, std=5.0, gate=200.0),
        bs.Site(0, 2, "elsewhere", 9000.0, std=80.0, gate=200.0),
        bs.Site(0, 2, "elsewhere", -2400.0, std=0.0, gate=200.0, cluster=1),
        bs.Site(0, 5, "start", -700.0, std=20.0, gate=100.0),
    ]
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def hidden_state(
    dtype: torch.dtype = torch.float32, rows: int = 3, length: int = 8, seed: int = 0
) -> Tensor:
    """(rows, length, WIDTH): ordinary values up to the gate, and massive ones of every level."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, WIDTH, generator=generator) * 20
    hidden[:, 0, 2] = torch.tensor([2200.0, 3000.0, 5900.0]).repeat(rows)[:rows]
    hidden[:, 3, 2] = torch.tensor([6100.0, 9000.0, 12000.0]).repeat(rows)[:rows]
    hidden[:, 5, 2] = torch.tensor([-201.0, -2400.0, 290.0]).repeat(rows)[:rows]
    hidden[:, 0, 5] = torch.tensor([-700.0, 101.0, -5000.0]).repeat(rows)[:rows]
    # at the gate is not beyond it
    hidden[:, 6, 2] = 200.0
    hidden[:, 6, 5] = -100.0
    return hidden.to(dtype)


def level_of(x: float, channel: int) -> bs.Site | None:
    """The site that a value belongs to; None: it is not massive."""
    here = [site for site in SITES if site.channel == channel]
    if not here or abs(x) <= (here[0].gate or 0):
        return None
    return min(here, key=lambda site: abs(site.mean - x))


def massive(hidden: Tensor) -> Tensor:
    """(B, T, D) bool."""
    return torch.tensor(
        [
            [[level_of(x, c) is not None for c, x in enumerate(token)] for token in row]
            for row in hidden.tolist()
        ]
    )
