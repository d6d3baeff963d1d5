"""What each mode must do to the output of a block, written out without the library."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import biassurgery as bs
from tests.contract.cases import CHANNELS, POSITIONS, VALUE, Case
from tests.models import CHANNEL, LAYER


def levels(x: Tensor, sites: bs.Sites) -> Tensor:
    """The calibrated mean nearest to each value, float32."""
    means = torch.tensor([site.mean for site in sites if site.layer == LAYER])
    return means[(x.float()[:, None] - means).abs().argmin(1)]


# What a mode writes over massive values x (N,), by its name: one line for a new mode.
WRITTEN: dict[str, Callable[[Tensor, bs.Sites], Tensor]] = {
    "set_mean": levels,
    "set_zero": lambda x, sites: torch.zeros_like(x),
    "set_value": lambda x, sites: torch.full_like(x, VALUE),
}


def entries(
    case: Case,
    before: Tensor,
    after: Tensor,
    massive: Tensor,
    positions: tuple[int, ...] = POSITIONS,
) -> Tensor:
    """(B, T, D) bool: the entries that the mode writes to, whether or not their values change."""
    inside = torch.zeros_like(before, dtype=torch.bool)
    if case.positional:
        for position in positions:
            inside[:, position, CHANNELS] = True
    elif case.mode == "zero_random":
        # One other, of its own choice.
        (channel,) = (after != before).flatten(0, 1).any(0).nonzero().flatten().tolist()
        inside[..., channel] = massive
    else:
        inside[..., CHANNEL] = massive
    return inside


def assert_edited(
    case: Case,
    before: Tensor,
    after: Tensor,
    massive: Tensor,
    sites: bs.Sites,
    positions: tuple[int, ...] = POSITIONS,
) -> None:
    """Assert that a patch did to `before` (B, T, D) what its mode says, and nothing else.

    massive (B, T) bool are the planted tokens.
    """
    assert after.dtype == before.dtype
    assert after.shape == before.shape
    assert torch.equal(massive, before[..., CHANNEL].abs() > 1000)  # the planted values are there
    changed = after != before
    inside = entries(case, before, after, massive, positions)
    assert not changed[~inside].any()
    if case.positional:
        assert (after[inside] == torch.tensor(VALUE).to(after.dtype)).all()
        return
    if case.mode == "zero_random":
        assert not inside[..., CHANNEL].any()
        assert (after[inside] == 0).all()
        return
    x = before[..., CHANNEL][massive]
    y = after[..., CHANNEL][massive]
    if case.mode == "noise":
        std = next(site.std for site in sites)
        deviation = (y.float() - levels(x, sites)) / std
        assert deviation.abs().max() < 6
        # A draw for each value, of which bfloat16 may round a few together.
        assert len(set(deviation.tolist())) > len(deviation) / 2
        assert deviation.abs().max() > 0.1
        return
    if case.mode == "shuffle":
        wanted = before.flip(0)[..., CHANNEL][massive]  # the only other sequence of two
    else:
        wanted = WRITTEN[case.mode](x, sites)
    assert torch.equal(y, wanted.to(y.dtype))
