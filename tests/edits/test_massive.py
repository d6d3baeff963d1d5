"""What the edits do to a hidden state, against explicit loops over its entries."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import biassurgery as bs
from biassurgery.edits.massive import (
    MassiveEdit,
    PositionEdit,
    WriteEdit,
    ZeroRandomEdit,
)
from biassurgery.errors import LevelOverflow
from tests.edits.hidden_states import DTYPES, SITES, WIDTH, hidden_state, level_of, massive


def by_loop(hidden: Tensor, write: Callable[[bs.Site], float]) -> Tensor:
    new = hidden.clone()
    for row in range(hidden.shape[0]):
        for token in range(hidden.shape[1]):
            for channel in range(WIDTH):
                site = level_of(hidden[row, token, channel].item(), channel)
                if site is not None:
                    new[row, token, channel] = write(site)
    return new


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "write", [lambda s: s.mean, lambda s: 0.0, lambda s: -123.5], ids=["mean", "zero", "value"]
)
def test_write_equals_a_loop_and_touches_nothing_else(dtype, write):
    hidden = hidden_state(dtype)
    kept = hidden.clone()
    edited = WriteEdit(SITES, {site: write(site) for site in SITES})(hidden)
    assert edited.dtype == dtype
    assert torch.equal(hidden, kept)  # out of place
    assert torch.equal(edited, by_loop(hidden, write))
    assert torch.equal(edited[~massive(hidden)], hidden[~massive(hidden)])
    assert massive(hidden).sum() == 12
    assert (edited[massive(hidden)] != hidden[massive(hidden)]).sum() >= 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_without_a_massive_value_is_handed_on(dtype):
    edit = WriteEdit(SITES, dict.fromkeys(SITES, 0.0))
    hidden = hidden_state(dtype)
    ordinary, changed = [], []
    for row, token in torch.cartesian_prod(*map(torch.arange, hidden.shape[:2])).tolist():
        step = hidden[row : row + 1, token : token + 1]
        (changed if massive(step).any() else ordinary).append(step)
    assert ordinary
    assert changed
    assert all(edit(step) is step for step in ordinary)
    for step in changed:
        assert torch.equal(edit(step), torch.where(massive(step), 0, step))
    edit.mesh = "ranks"  # which must all do the same
    assert all(edit(step) is not step for step in ordinary)


def test_a_mapped_step_is_not_looked_at():
    edit = WriteEdit(SITES, dict.fromkeys(SITES, 0.0))
    hidden = hidden_state(torch.float32)
    assert massive(hidden).any()
    mapped = torch.vmap(lambda token: edit(token[None, None])[0, 0])(hidden.flatten(0, 1))
    assert torch.equal(mapped.view(hidden.shape), edit(hidden))


@pytest.mark.parametrize(
    ("channel", "x", "level"),
    [
        (2, 201.0, -2400.0),
        (2, 299.0, -2400.0),
        (2, 301.0, 3000.0),
        (2, 5999.0, 3000.0),
        (2, 6001.0, 9000.0),
        (2, 1e6, 9000.0),
        (2, -1e6, -2400.0),
        (5, 101.0, -700.0),
        (5, -5000.0, -700.0),
    ],
)
def test_each_value_goes_to_its_nearest_level(channel, x, level):
    hidden = torch.zeros(1, 1, WIDTH).index_fill(2, torch.tensor(channel), x)
    assert WriteEdit(SITES, {site: site.mean for site in SITES})(hidden)[0, 0, channel] == level


def test_a_channel_without_a_gate_takes_half_its_smallest_level():
    sites = bs.Sites([bs.Site(0, 1, "start", -400.0), bs.Site(0, 1, "elsewhere", 1000.0)])
    edit = WriteEdit(sites, dict.fromkeys(sites, 7.0))
    hidden = torch.tensor([199.0, 200.0, 201.0, -199.0, -201.0, 1e4]).view(1, 6, 1).expand(1, 6, 3)
    assert edit(hidden)[0, :, 1].tolist() == [199.0, 200.0, 7.0, -199.0, 7.0, 7.0]
    assert edit(hidden)[0, :, 0].tolist() == hidden[0, :, 0].tolist()


def test_noise_has_the_calibrated_spread_around_each_level():
    rows = 4000
    hidden = torch.zeros(rows, 3, WIDTH)
    hidden[:, 0, 2] = 3100.0
    hidden[:, 1, 2] = 8000.0
    hidden[:, 2, 2] = -2000.0
    hidden[:, 0, 5] = -600.0
    edit = WriteEdit(SITES, {site: site.mean for site in SITES}, {site: site.std for site in SITES})
    torch.manual_seed(1)
    noisy = edit(hidden)
    for (token, channel), site in zip([(0, 2), (1, 2), (2, 2), (0, 5)], SITES, strict=True):
        values = noisy[:, token, channel].double()
        assert values.mean().item() == pytest.approx(site.mean, abs=4 * site.std / rows**0.5 + 1e-9)
        assert values.std().item() == pytest.approx(
            site.std, rel=0.05
        )  # 4 sigma of the estimate is 4.5 %
    first = noisy[:, 0, 2].double() - 3000
    second = noisy[:, 0, 5].double() + 700
    assert (
        abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 4 / rows**0.5
    )  # a draw for each entry
    assert not torch.equal(edit(hidden), noisy)
    assert torch.equal(noisy[hidden == 0], hidden[hidden == 0])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_control_zeroes_as_many_others_at_the_same_tokens(dtype, seed):
    hidden = hidden_state(dtype)
    hidden[hidden == 0] = 1
    edited = ZeroRandomEdit(SITES, WIDTH, seed)(hidden)
    changed = edited != hidden
    assert (edited[changed] == 0).all()
    assert torch.equal(changed.sum(-1), massive(hidden).sum(-1))
    channels = set(changed.nonzero()[:, 2].tolist())
    assert not channels & {2, 5}
    assert len(channels) == 2


def test_the_control_depends_on_its_seed_and_on_nothing_else():
    hidden = hidden_state() + 1e-3
    torch.manual_seed(1)
    first = ZeroRandomEdit(SITES, WIDTH, 0)(hidden)
    torch.manual_seed(2)
    assert torch.equal(ZeroRandomEdit(SITES, WIDTH, 0)(hidden), first)
    assert any(
        not torch.equal(ZeroRandomEdit(SITES, WIDTH, seed)(hidden), first) for seed in range(1, 5)
    )


@pytest.mark.parametrize("start", [0, 2, 5, torch.tensor(2)])
def test_positions_count_from_the_beginning_of_the_sequence(start):
    hidden = hidden_state()
    edited = PositionEdit(42.5, (0, 7), (0, 4, 5, 30), WIDTH, 0)(hidden, start)
    expected = hidden.clone()
    for token in range(hidden.shape[1]):
        if token + int(start) in (0, 4, 5, 30):
            for channel in (0, 7):
                expected[:, token, channel] = 42.5
    assert torch.equal(edited, expected)
    assert not torch.equal(edited, hidden)


@pytest.mark.parametrize(
    "edit",
    [WriteEdit(SITES, dict.fromkeys(SITES, 70000.0)), PositionEdit(-70000.0, (1,), (0,), WIDTH, 0)],
)
def test_a_level_too_large_for_the_hidden_state_raises_and_writes_no_infinity(edit):
    assert edit(hidden_state(torch.bfloat16)).abs().max() > 69000
    with pytest.raises(LevelOverflow, match="float16"):
        edit(hidden_state(torch.float16))


def test_the_base_classes_do_nothing_of_their_own():
    with pytest.raises(NotImplementedError):
        MassiveEdit(SITES)(hidden_state())
