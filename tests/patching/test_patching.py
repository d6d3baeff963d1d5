"""Applying, stacking and removing patches: what is left behind is nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import biassurgery as bs
from biassurgery.errors import NotPatched
from biassurgery.modes import SetMean, SetValue, SetZero
from biassurgery.surgery import edit as surgery
from biassurgery.surgery.block import EditedBlock, hidden_of
from biassurgery.surgery.edit import Edit
from biassurgery.surgery.swap import host_class
from tests import models
from tests.models import CHANNEL, LAYER
from tests.patching.patched_models import names
from tests.state import output_of, untouched


def massive_values(model: Any, family: str, batch: torch.Tensor) -> torch.Tensor:
    """Channel `CHANNEL` of the output of block `LAYER` at the first massive position, one value a
    row.
    """
    seen = []
    hook = models.blocks(model, family)[LAYER].register_forward_hook(
        lambda _, __, out: seen.append(hidden_of(out))
    )
    output_of(model, batch)
    hook.remove()
    return seen[0][:, 1 if family == "timm" else 0, CHANNEL]


# -- what is applied


def test_a_patch_is_in_place_and_says_what_it_is(model, batch, sites):
    kind = type(model)
    keys = list(model.state_dict())
    before = output_of(model, batch)
    assert bs.patches(model) == ()
    assert bs.patch_model(model, "set_zero", sites=sites, layers="all") is model
    (patch,) = bs.patches(model)
    assert patch.mode == SetZero()
    assert patch.layers == (1, 2, 3, 4)
    assert list(patch.sites) == list(sites)
    assert type(model) is kind
    assert list(model.state_dict()) == keys
    model.load_state_dict(model.state_dict())  # strict
    assert not torch.equal(output_of(model, batch), before)
    assert bs.unpatch_model(model) is model


@pytest.mark.parametrize("layers", ["first", "all", [2]])
@pytest.mark.parametrize("mode", ["set_mean", "set_zero", "noise", "shuffle", "zero_random"])
def test_unpatching_leaves_no_trace(model, batch, sites, mode, layers):
    with untouched(model, batch):
        bs.patch_model(model, mode, sites=sites, layers=layers)
        output_of(model, batch)
        bs.unpatch_model(model)
    with untouched(model, batch), bs.patched(model, mode, sites=sites, layers=layers):
        output_of(model, batch)


def test_patching_changes_only_the_chosen_blocks(model, family, batch, sites):
    blocks = models.blocks(model, family)
    bs.patch_model(model, "set_zero", sites=sites, layers=[2, 4])
    assert [isinstance(block, EditedBlock) for block in blocks] == [False, False, True, False, True]
    assert len({type(block) for block in blocks}) == 2  # one subclass for the class, shared
    assert all(isinstance(block, host_class(blocks[0])) for block in blocks)
    assert host_class(blocks[2]) is type(blocks[0])


def test_unpatching_an_unpatched_model_is_no_error(model, batch):
    with untouched(model, batch):
        assert bs.unpatch_model(model) is model


# -- stacking


def test_patches_are_applied_in_the_order_in_which_they_came(model, family, batch, sites):
    mean = torch.tensor(sites.at(LAYER)[0].mean).item()
    with (
        bs.patched(model, "set_value", sites=sites, value=6000.0),
        bs.patched(model, "set_mean", sites=sites),
    ):
        nearest = min(
            sites.at(LAYER), key=lambda site: abs(site.mean - 6000.0)
        )  # of equal distances any
        assert names(model) == ["set_value", "set_mean"]
        assert (
            massive_values(model, family, batch).tolist() == [torch.tensor(nearest.mean).item()] * 3
        )
    with (
        bs.patched(model, "set_mean", sites=sites),
        bs.patched(model, "set_value", sites=sites, value=6000.0),
    ):
        assert names(model) == ["set_mean", "set_value"]
        assert massive_values(model, family, batch).tolist() == [6000.0] * 3
    with bs.patched(model, "set_mean", sites=sites):
        assert massive_values(model, family, batch).tolist() == [mean] * 3


def test_each_patch_can_be_removed_alone(model, family, batch, sites):
    with untouched(model, batch):
        bs.patch_model(model, "set_mean", sites=sites)
        mean = output_of(model, batch)
        bs.patch_model(model, "set_value", sites=sites, value=6000.0, layers="all")
        bs.patch_model(model, "set_value", sites=sites, value=9000.0, layers=[3])
        assert names(model) == ["set_mean", "set_value", "set_value"]
        bs.unpatch_model(model, SetValue(9000.0))
        assert [patch.mode for patch in bs.patches(model)] == [SetMean(), SetValue(6000.0)]
        with pytest.raises(NotPatched, match="set_zero"):
            bs.unpatch_model(model, "set_zero")
        with pytest.raises(NotPatched, match=r"9000"):
            bs.unpatch_model(model, SetValue(9000.0))
        bs.unpatch_model(model, "set_value")
        assert names(model) == ["set_mean"]
        assert torch.equal(output_of(model, batch), mean)
        bs.unpatch_model(model, SetMean())


def test_one_name_removes_all_patches_of_that_mode(model, batch, sites):
    with untouched(model, batch):
        for layer in (1, 2):
            bs.patch_model(model, "set_zero", sites=sites, layers=[layer])
        assert names(model) == ["set_zero", "set_zero"]
        bs.unpatch_model(model, "set_zero")


def test_the_same_patch_twice_is_refused(model, batch, sites):
    bs.patch_model(model, "set_zero", sites=sites, layers=[2])
    with untouched(model, batch):
        for layers in ([2], "all", [1, 2]):
            with pytest.raises(bs.AlreadyPatched, match=r"set_zero.*layer 2.*unpatch_model"):
                bs.patch_model(model, "set_zero", sites=sites, layers=layers)
            with (
                pytest.raises(bs.AlreadyPatched),
                bs.patched(model, "set_zero", sites=sites, layers=layers),
            ):
                pass
    bs.patch_model(model, "set_zero", sites=sites, layers=[3])  # elsewhere it is another patch
    bs.patch_model(model, "noise", sites=sites, layers=[2], scale=0.5)
    bs.patch_model(model, "noise", sites=sites, layers=[2], scale=0.25)
    assert names(model) == ["set_zero", "set_zero", "noise", "noise"]  # in order of application


# -- the context manager


def test_nested_contexts_remove_their_own(model, batch, sites):
    bs.patch_model(model, "noise", sites=sites, scale=0.0, layers=[3])
    with untouched(model, batch):
        with bs.patched(model, "set_mean", sites=sites) as same:
            assert same is model
            with bs.patched(model, "set_zero", sites=sites):
                assert names(model) == ["noise", "set_mean", "set_zero"]
            assert names(model) == ["noise", "set_mean"]
        assert names(model) == ["noise"]


def test_a_context_ends_also_by_an_exception(model, batch, sites):
    with (
        untouched(model, batch),
        pytest.raises(KeyError),
        bs.patched(model, "set_zero", sites=sites),
    ):
        raise KeyError


def test_what_happens_inside_a_context_is_respected(model, batch, sites):
    with untouched(model, batch), bs.patched(model, "set_zero", sites=sites):
        bs.unpatch_model(model)
        assert names(model) == []
    with bs.patched(model, "set_zero", sites=sites):
        bs.patch_model(model, "set_mean", sites=sites)
    assert names(model) == ["set_mean"]


# -- a failure half-way


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_failure_at_any_block_leaves_no_trace(model, batch, sites, monkeypatch, at, when, error):
    bs.patch_model(model, "noise", sites=sites, scale=0.0, layers=[2])
    attach = Edit.attach
    calls = []

    def fails(edit: Edit, block: nn.Module) -> None:
        calls.append(block)
        if when == "after" or len(calls) < at:
            attach(edit, block)
        if len(calls) == at:
            raise error("half-way")

    with untouched(model, batch):
        monkeypatch.setattr(Edit, "attach", fails)
        with pytest.raises(error, match="half-way"):
            bs.patch_model(model, "set_zero", sites=sites, layers="all")
        monkeypatch.undo()
        assert len(calls) == at
    bs.patch_model(model, "set_zero", sites=sites, layers="all")


def test_a_block_whose_class_cannot_be_changed_leaves_no_trace(model, batch, sites, monkeypatch):
    made = surgery.class_with
    classes = []

    def fails(host: type, wanted: list[type]) -> type:
        classes.append(host)
        if len(classes) == 2:
            raise TypeError("metaclass conflict")
        return made(host, wanted)

    with untouched(model, batch):
        monkeypatch.setattr(surgery, "class_with", fails)
        with pytest.raises(TypeError, match="metaclass"):
            bs.patch_model(model, "set_zero", sites=sites, layers="all")
        monkeypatch.undo()
    bs.patch_model(model, "set_zero", sites=sites, layers="all")


def test_a_failure_in_a_forward_leaves_the_patch(model, batch, sites):
    with untouched(model, batch):
        bs.patch_model(model, "set_zero", sites=sites)
        with pytest.raises(Exception):  # noqa: B017, PT011 (whatever the model raises)
            model(torch.zeros(1, 2, 3))
        assert names(model) == ["set_zero"]
        bs.unpatch_model(model)
