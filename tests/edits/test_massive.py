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
    ShuffleEdit,
    WriteEdit,
    ZeroRandomEdit,
)
from biassurgery.surgery.block import BlockEdit

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


def by_loop(hidden: Tensor, write: Callable[[bs.Site], float]) -> Tensor:
    new = hidden.clone()
    for row in range(hidden.shape[0]):
        for token in range(hidden.shape[1]):
            for channel in range(WIDTH):
                site = level_of(hidden[row, token, channel].item(), channel)
                if site is not None:
                    new[row, token, channel] = write(site)
    return new


def massive(hidden: Tensor) -> Tensor:
    """(B, T, D) bool."""
    return torch.tensor(
        [
            [[level_of(x, c) is not None for c, x in enumerate(token)] for token in row]
            for row in hidden.tolist()
        ]
    )


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


# -- shuffle


def donors(hidden: Tensor, row: int, token: int, channel: int) -> list[tuple[int, float]]:
    """(sequence, value) that a loop would allow: other sequences with this level; at the same token
    if massive there, else the first.
    """
    level = level_of(hidden[row, token, channel].item(), channel)
    result = []
    for other in range(hidden.shape[0]):
        tokens = [
            t
            for t in range(hidden.shape[1])
            if level_of(hidden[other, t, channel].item(), channel) == level
        ]
        if other != row and tokens:
            result.append(
                (other, hidden[other, token if token in tokens else tokens[0], channel].item())
            )
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 3, 5])
def test_shuffle_takes_the_values_of_another_sequence(dtype, rows):
    generator = torch.Generator().manual_seed(rows)
    hidden = hidden_state(dtype, rows)
    for row in range(rows):  # every value is its own, and delimiters stand at different tokens
        hidden[row, 0, 2] = 3000 + 64 * row
        hidden[row, 3, 2] = 0
        hidden[row, int(torch.randint(1, 5, (1,), generator=generator)), 2] = 8000 + 128 * row
        hidden[row, 5, 2] = -2400 - 64 * row
        hidden[row, 0, 5] = -700 - 16 * row
    where = massive(hidden)
    edit = ShuffleEdit(SITES)
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        shuffled = edit(hidden)
        assert torch.equal(shuffled[~where], hidden[~where])
        for row, token, channel in where.nonzero().tolist():
            allowed = dict(donors(hidden, row, token, channel))
            taken = [
                other
                for other, value in allowed.items()
                if value == shuffled[row, token, channel].item()
            ]
            assert len(taken) == 1, (row, token, channel)
            seen.add((row, taken[0]))
    assert seen == {(a, b) for a in range(rows) for b in range(rows) if a != b}


def test_shuffle_passes_over_sequences_that_have_nothing_to_give():
    """Of four sequences the second and the last have a delimiter: they must exchange it whatever
    the draw.
    """
    hidden = torch.zeros(4, 6, WIDTH)
    hidden[:, 0, 2] = torch.tensor([3000.0, 3001.0, 3002.0, 3003.0])
    hidden[1, 2, 2] = 9001.0
    hidden[3, 4, 2] = 9003.0
    for seed in range(20):
        torch.manual_seed(seed)
        shuffled = ShuffleEdit(SITES)(hidden)
        assert shuffled[1, 2, 2] == 9003.0
        assert shuffled[3, 4, 2] == 9001.0
        assert all(shuffled[row, 0, 2] != hidden[row, 0, 2] for row in range(4))


def test_shuffle_leaves_a_value_that_no_other_sequence_has():
    hidden = torch.zeros(3, 4, WIDTH)
    hidden[:, 0, 2] = torch.tensor([3000.0, 3001.0, 3002.0])
    hidden[1, 2, 5] = -700.0
    shuffled = ShuffleEdit(SITES)(hidden)
    assert shuffled[1, 2, 5] == -700.0
    assert not torch.equal(shuffled[:, 0, 2], hidden[:, 0, 2])


def test_shuffle_takes_both_channels_of_a_token_from_one_sequence():
    hidden = torch.zeros(5, 2, WIDTH)
    hidden[:, 0, 2] = 3000.0 + torch.arange(5)
    hidden[:, 0, 5] = -700.0 - torch.arange(5)
    for seed in range(10):
        torch.manual_seed(seed)
        shuffled = ShuffleEdit(SITES)(hidden)
        assert torch.equal(shuffled[:, 0, 2] - 3000, -700 - shuffled[:, 0, 5])


def test_shuffle_needs_two_sequences():
    with pytest.raises(bs.BatchTooSmall, match="two"):
        ShuffleEdit(SITES)(hidden_state(rows=1))


# -- the control, and positions


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


# -- gradients, dtypes, devices


@pytest.mark.parametrize("kind", ["set_mean", "noise", "zero_random", "set_value"])
def test_gradients_pass_except_where_a_value_is_replaced(kind):
    hidden = hidden_state().double().requires_grad_()
    edits: dict[str, Callable[[], BlockEdit]] = {
        "set_mean": lambda: WriteEdit(SITES, {site: site.mean for site in SITES}),
        "noise": lambda: WriteEdit(
            SITES, {site: site.mean for site in SITES}, {site: site.std for site in SITES}
        ),
        "zero_random": lambda: ZeroRandomEdit(SITES, WIDTH, 0),
        "set_value": lambda: PositionEdit(42.5, (0, 7), (0, 4), WIDTH, 0),
    }
    weight = torch.randn(hidden.shape, dtype=torch.float64)
    edited = edits[kind]()(hidden)
    (gradient,) = torch.autograd.grad((edited * weight).sum(), hidden)
    replaced = {
        "set_mean": massive(hidden),
        "noise": massive(hidden),
        "zero_random": edited == 0,
        "set_value": (
            torch.zeros_like(hidden, dtype=torch.bool).index_fill(1, torch.tensor([0, 4]), True)
            & torch.zeros(WIDTH, dtype=torch.bool).index_fill(0, torch.tensor([0, 7]), True)
        ),
    }[kind]
    assert replaced.any()
    assert torch.equal(gradient, torch.where(replaced, 0.0, weight))


def test_shuffled_values_carry_the_gradient_to_the_sequence_they_came_from():
    hidden = torch.zeros(2, 2, WIDTH, dtype=torch.float64)
    hidden[:, 0, 2] = torch.tensor([3000.0, 3100.0])
    hidden.requires_grad_()
    shuffled = ShuffleEdit(SITES)(hidden)
    (gradient,) = torch.autograd.grad(shuffled[0, 0, 2], hidden)
    expected = torch.zeros_like(hidden)
    expected[1, 0, 2] = 1
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_casting_an_edit_leaves_its_levels_in_float32(cast):
    sites = bs.Sites(
        [
            bs.Site(0, 2, "start", 2999.7, std=0.001, gate=200.1),
            bs.Site(0, 2, "elsewhere", 5001.3, gate=200.1),
        ]
    )
    edit = WriteEdit(sites, {site: site.mean for site in sites}, {site: site.std for site in sites})
    before = {name: buffer.clone() for name, buffer in edit.named_buffers()}
    getattr(edit, cast)()
    for name, buffer in edit.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])
    assert {before[name].dtype for name in ("middles", "gates", "values", "spread")} == {
        torch.float32
    }
    assert edit.state_dict() == {}


def test_moving_an_edit_to_the_meta_device_loses_nothing():
    edit = WriteEdit(SITES, {site: site.mean for site in SITES})
    wanted = edit(hidden_state())
    edit.to("meta")
    assert torch.equal(edit(hidden_state()), wanted)
    edit.to_empty(device="cpu")
    assert torch.equal(edit(hidden_state()), wanted)


@pytest.mark.parametrize(
    "edit",
    [WriteEdit(SITES, dict.fromkeys(SITES, 70000.0)), PositionEdit(-70000.0, (1,), (0,), WIDTH, 0)],
)
def test_a_level_too_large_for_the_hidden_state_raises_and_writes_no_infinity(edit):
    assert edit(hidden_state(torch.bfloat16)).abs().max() > 69000
    with pytest.raises(bs.LevelOverflow, match="float16"):
        edit(hidden_state(torch.float16))


def test_the_base_classes_do_nothing_of_their_own():
    with pytest.raises(NotImplementedError):
        MassiveEdit(SITES)(hidden_state())
