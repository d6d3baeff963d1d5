"""Sites as people have them: filtered, and of channels that are born at different blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median_low
from typing import Any

import pytest
import torch
from torch import Tensor

import biassurgery as bs
from tests import encoders, models, vision
from tests.contract.cases import CASES, Case, parametrize
from tests.contract.oracle import assert_edited
from tests.contract.running import distance, hidden_of, see
from tests.models import CHANNEL, KEYS, LAYER, START_ID

OTHER = 40  # a second channel, which is massive where the first is
LATER = LAYER + 2  # from this block on

activations = [case for case in CASES if case.on_values and not case.positional]


@parametrize([case for case in activations if case.modality == "text"])
@pytest.mark.parametrize("role", ["start", "elsewhere"])
def test_filtered_sites(case: Case, role: str) -> None:
    """Massive values of the role that was left out stay, bit for bit."""
    batch = case.batch()
    sites = case.sites(std=200.0)
    some = bs.Sites([site for site in sites if site.role == role], origin=sites.origin)
    before = see(case, case.model(), batch)
    after = see(case, case.patch(case.model(), some), batch)
    is_start = (batch == START_ID)[..., None]
    left_out = ~is_start if role == "start" else is_start
    changed = before.hidden != after.hidden
    assert not (changed & left_out).any()
    # Elsewhere it is what all sites do: the levels that stay are those that were left out.
    whole = torch.where(left_out, before.hidden, after.hidden)
    assert torch.equal(whole, after.hidden)
    assert changed.any() or (case.mode, role) in (("set_mean", "start"), ("shuffle", "start"))
    if case.mode in ("set_mean", "set_zero", "set_value"):
        both = see(case, case.patch(case.model(), sites), batch)
        mixed = torch.where(left_out, before.hidden, both.hidden)
        assert torch.equal(after.hidden, mixed)
        assert_edited(case, before.hidden, both.hidden, case.massive(batch), sites)


@contextmanager
def with_a_later_channel(case: Case, model: Any) -> Iterator[None]:
    """From block `LATER` on, the planted tokens have another massive channel."""

    def add(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        hidden = given.clone()
        named = sum(given[..., key] > 1 for key in KEYS.values())
        hidden[..., OTHER] += 5000.0 * (named > 0)
        return (
            ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
        )

    blocks = (vision.blocks if case.modality == "image" else models.blocks)(model, case.family)
    hook = blocks[LATER].register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def meets(case: Case, model: Any, batch: Tensor) -> set[tuple[int, int]]:
    """(layer, channel) in which a value meets the definition, one sequence at a time."""
    blocks = (vision.blocks if case.modality == "image" else models.blocks)(model, case.family)
    found = set()
    for row in batch.split(1):
        seen: list[Tensor] = []
        hooks = [
            block.register_forward_hook(lambda _, __, out, seen=seen: seen.append(hidden_of(out)))
            for block in blocks
        ]
        with torch.no_grad():
            model(row)
        for hook in hooks:
            hook.remove()
        for layer, hidden in enumerate(seen):
            magnitudes = hidden.abs().double().flatten(0, -2)
            limit = max(100.0, 1000 * median_low(magnitudes.flatten().tolist()))
            found |= {(layer, channel) for channel in (magnitudes > limit).nonzero()[:, 1].tolist()}
    return found


# Behind norms a value is made anew in every block: tests/adapters/test_encoders.py has encoders.
ON_A_STREAM = [case for case in CASES if case.family not in encoders.FAMILIES]


@parametrize([case for case in ON_A_STREAM if case.variant == "set_zero"])
def test_channels_born_at_different_blocks(case: Case) -> None:
    """By default each is changed where it is born, and `set_zero` leaves nothing massive."""
    model = case.model()
    batch = case.batch()
    born = {(LAYER, CHANNEL), (LATER, OTHER)}
    with with_a_later_channel(case, model):
        massive = meets(case, model, batch)
        assert {min(p for p in massive if p[1] == channel) for channel in (CHANNEL, OTHER)} == born
        sites = bs.calibrate(model, case.batch(4, seed=7))
        before = see(case, model, batch)
        moved = {}
        for mode in ("set_zero", "set_mean"):
            with bs.patched(model, mode, sites=sites):
                used = {(site.layer, site.channel) for site in bs.patches(model)[0].sites}
                assert used == born
                left = meets(case, model, batch)
                assert left == set() if mode == "set_zero" else left >= born
                moved[mode] = distance(see(case, model, batch).logits, before.logits)
        assert moved["set_zero"] > 0.02
        assert moved["set_mean"] < 0.2 * moved["set_zero"]
        assert torch.equal(see(case, model, batch).logits, before.logits)
