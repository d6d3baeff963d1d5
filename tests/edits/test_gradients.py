"""Gradients through edits, and edits that are cast and moved."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import biassurgery as bs
from biassurgery.edits.massive import (
    PositionEdit,
    ShuffleEdit,
    WriteEdit,
    ZeroRandomEdit,
)
from biassurgery.surgery.block import BlockEdit
from tests.edits.hidden_states import SITES, WIDTH, hidden_state, massive


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
